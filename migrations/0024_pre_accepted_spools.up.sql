-- The last record that a spool under refusal and the ledger have in common: behind it the ledger goes on once an operator
-- accepts it. What the spool wrote since, up to its last record, was never stored.
-- Lock and duration: ACCESS EXCLUSIVE on spools for one new name, milliseconds. Older code that opens a spool or stores
-- a node's report fails, and is asked again, until it is replaced.

ALTER TABLE postroad.spools RENAME COLUMN reported_last_record TO resume_record;
COMMENT ON COLUMN postroad.spools.resume_record IS
    'Last record that a spool under refusal has in common with the ledger; behind it AcceptSpool goes on';
