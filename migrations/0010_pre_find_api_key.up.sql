-- Every call begins by looking for the API key that it presents: as a function that is one round trip instead of four.
-- It runs with its caller's rights, and row-level security shows it the one key with that readable part.
-- Lock and duration: a new function, milliseconds. Older code does not see it.

CREATE FUNCTION postroad.find_api_key(presented text) RETURNS SETOF postroad.api_keys LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('postroad.account', '', true), set_config('postroad.api_key_lookup', presented, true);
    RETURN QUERY SELECT * FROM postroad.api_keys WHERE lookup = presented;
END
$$;
