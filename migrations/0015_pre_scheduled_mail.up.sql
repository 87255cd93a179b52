-- What the submitter asked for beside delivery: a time before which the message does not go, and a priority. Mail may be
-- held for as long as its record is kept, so that partitions of days whose mail still waits can be left out of dropping.
-- Lock and duration: ACCESS EXCLUSIVE on messages and its partitions for new columns without a rewrite, milliseconds.
-- Older code names its columns, calls the function without `kept`, and does not notice.

ALTER TABLE postroad.messages
    ADD COLUMN send_time timestamptz,
    ADD COLUMN priority smallint NOT NULL DEFAULT 0;
COMMENT ON COLUMN postroad.messages.send_time IS 'Until when the submitter had it held; NULL when it was due at once';

-- As drop_partitions(before_day), without the days in `kept`: whoever calls can see rows, this function's owner cannot.
CREATE FUNCTION postroad.drop_partitions(before_day date, kept date[]) RETURNS integer
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '2s'
AS $$
DECLARE
    partition text;
    dropped integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('postroad.ensure_partitions', 0));
    FOR partition IN
        SELECT child.relname
        FROM pg_inherits
        JOIN pg_class AS child ON child.oid = inhrelid
        JOIN pg_class AS parent ON parent.oid = inhparent
        JOIN pg_namespace AS namespace ON namespace.oid = parent.relnamespace
        WHERE namespace.nspname = 'postroad'
            AND parent.relname IN ('messages', 'recipients', 'delivery_events')
            AND to_date(right(child.relname, 8), 'YYYYMMDD') < before_day
            AND to_date(right(child.relname, 8), 'YYYYMMDD') <> ALL (kept)
        ORDER BY child.relname
    LOOP
        EXECUTE format('DROP TABLE postroad.%I', partition);
        dropped := dropped + 1;
    END LOOP;
    RETURN dropped;
END
$$;

REVOKE EXECUTE ON FUNCTION postroad.drop_partitions(date, date[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION postroad.drop_partitions(date, date[]) TO postroad_fleet;
