-- Books: what each spool accepted for each account and what became of it, kept by whoever stores ledger records, and
-- what a comparison with the spool found.
-- Lock and duration: the index on recipients stops their writers while it is built: about a second for ten million
-- rows, nearly all of which are not in it. The rest are new objects. Older code does not see them and writes no books:
-- they begin with the first day on which no older code can have stored anything.

CREATE INDEX ix_recipients_waiting ON postroad.recipients (message_id) WHERE state < 6;

CREATE TABLE postroad.book_start (
    first_day date NOT NULL,
    one boolean NOT NULL DEFAULT true,
    CONSTRAINT pk_book_start PRIMARY KEY (one),
    CONSTRAINT ck_book_start_one CHECK (one)
);
INSERT INTO postroad.book_start (first_day)
SELECT CASE WHEN EXISTS (SELECT FROM pg_inherits WHERE inhparent = 'postroad.messages'::regclass)
            THEN (now() AT TIME ZONE 'UTC')::date + 2 ELSE date '1970-01-01' END;
COMMENT ON TABLE postroad.book_start IS 'One row: messages made before this day (by their ids, UTC) are in no book';

-- Recipients by the day of their message, so that books end with the partitions of the days that they tell of.
CREATE TABLE postroad.book_entries (
    spool uuid NOT NULL,
    account text NOT NULL,
    day date NOT NULL,
    accepted bigint NOT NULL,
    sent bigint NOT NULL,
    bounced bigint NOT NULL,
    failed bigint NOT NULL,
    expired bigint NOT NULL,
    cancelled bigint NOT NULL,
    CONSTRAINT pk_book_entries PRIMARY KEY (spool, account, day)
);
CREATE INDEX ix_book_entries_day ON postroad.book_entries (day);

-- The newest comparison of each spool.
CREATE TABLE postroad.book_comparisons (
    spool uuid NOT NULL,
    node text NOT NULL,
    as_of_record bigint NOT NULL,
    compare_time timestamptz NOT NULL,
    CONSTRAINT pk_book_comparisons PRIMARY KEY (spool)
);

-- What it showed of each account.
CREATE TABLE postroad.books (
    account text NOT NULL,
    spool uuid NOT NULL,
    node text NOT NULL,
    as_of_record bigint NOT NULL,
    compare_time timestamptz NOT NULL,
    accepted bigint NOT NULL,
    sent bigint NOT NULL,
    bounced bigint NOT NULL,
    failed bigint NOT NULL,
    expired bigint NOT NULL,
    cancelled bigint NOT NULL,
    waiting bigint NOT NULL,
    earlier bigint NOT NULL,
    spool_waiting bigint NOT NULL,
    ledger_digest bytea NOT NULL,
    spool_digest bytea NOT NULL,
    CONSTRAINT pk_books PRIMARY KEY (account, spool)
);
CREATE INDEX ix_books_spool ON postroad.books (spool);
COMMENT ON COLUMN postroad.books.waiting IS 'Recipients that wait in the ledger, those in no book (earlier) included';

CREATE TABLE postroad.book_findings (
    finding bigint GENERATED ALWAYS AS IDENTITY,
    account text NOT NULL,
    spool uuid NOT NULL,
    node text NOT NULL,
    kind smallint NOT NULL,
    message_id uuid,
    recipient_index integer,
    detail text NOT NULL,
    first_seen_time timestamptz NOT NULL,
    last_seen_time timestamptz NOT NULL,
    resolve_time timestamptz,
    CONSTRAINT pk_book_findings PRIMARY KEY (finding),
    CONSTRAINT ck_book_findings_kind CHECK (kind BETWEEN 1 AND 6)
);
CREATE UNIQUE INDEX uq_book_findings_open
    ON postroad.book_findings (spool, account, kind, message_id, recipient_index) NULLS NOT DISTINCT
    WHERE resolve_time IS NULL;
CREATE INDEX ix_book_findings_account ON postroad.book_findings (account, finding);
CREATE INDEX ix_book_findings_resolve_time ON postroad.book_findings (resolve_time);
COMMENT ON COLUMN postroad.book_findings.kind IS 'As postroad.control.v1.BookFinding.Kind';

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['book_start', 'book_entries', 'book_comparisons', 'books', 'book_findings'] LOOP
        EXECUTE format('ALTER TABLE postroad.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE postroad.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_fleet USING (true)', 'pl_' || name || '_fleet', name
        );
    END LOOP;
    FOREACH name IN ARRAY ARRAY['books', 'book_findings'] LOOP
        EXECUTE format(
            'CREATE POLICY %I ON postroad.%I TO postroad_api '
            'USING (account = (SELECT postroad.current_account()) OR (SELECT postroad.is_operator()))',
            'pl_' || name || '_api', name
        );
    END LOOP;
END
$$;
GRANT SELECT ON postroad.books, postroad.book_findings TO postroad_api;
GRANT SELECT ON postroad.book_start TO postroad_fleet;
GRANT SELECT, INSERT, UPDATE, DELETE
    ON postroad.book_entries, postroad.book_comparisons, postroad.books, postroad.book_findings TO postroad_fleet;
