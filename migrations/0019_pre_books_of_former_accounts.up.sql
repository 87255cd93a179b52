-- Books of an account whose id was another's before tell of its own days: the fleet's side reads since when it is.
-- Lock and duration: none that lasts, milliseconds. Older code does not ask.

GRANT SELECT (messages_since) ON postroad.accounts TO postroad_fleet;
