-- Books of an account whose id was another's before tell of its own days: the fleet's side reads since when it is.
-- Lock and duration: none that lasts, milliseconds. Older code does not ask.

GRANT SELECT (account, messages_since) ON postroad.accounts TO postroad_fleet;
CREATE POLICY pl_accounts_fleet ON postroad.accounts FOR SELECT TO postroad_fleet USING (messages_since IS NOT NULL);
