-- Books of the replicated queue: what was accepted into it for each account and what became of it. A row for each spool
-- that tells of some, so that workers do not wait for each other's commits; the book is their sum. What commands and jobs
-- ended is the queue's own, under the spool 00000000-0000-0000-0000-000000000001.
-- Lock and duration: new objects. Nothing was in the queue before any version that writes them.

CREATE TABLE postroad.queue_entries (
    spool uuid NOT NULL,
    account text NOT NULL,
    day date NOT NULL,
    accepted bigint NOT NULL,
    sent bigint NOT NULL,
    bounced bigint NOT NULL,
    failed bigint NOT NULL,
    expired bigint NOT NULL,
    cancelled bigint NOT NULL,
    CONSTRAINT pk_queue_entries PRIMARY KEY (spool, account, day)
);
CREATE INDEX ix_queue_entries_day ON postroad.queue_entries (day);

ALTER TABLE postroad.queue_entries ENABLE ROW LEVEL SECURITY;
ALTER TABLE postroad.queue_entries FORCE ROW LEVEL SECURITY;
CREATE POLICY pl_queue_entries_fleet ON postroad.queue_entries TO postroad_fleet USING (true);
GRANT SELECT, INSERT, UPDATE, DELETE ON postroad.queue_entries TO postroad_fleet;
