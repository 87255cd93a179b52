-- What a spool that was refused says that the control plane had acknowledged: there the ledger goes on once an operator
-- accepts it. What it wrote since, up to its last record, was never stored.
-- Lock and duration: ACCESS EXCLUSIVE on spools for one new name, milliseconds. Older code that opens a spool or stores
-- a node's report fails, and is asked again, until it is replaced.

ALTER TABLE postroad.spools RENAME COLUMN reported_last_record TO reported_acknowledged;
COMMENT ON COLUMN postroad.spools.reported_acknowledged IS
    'Last record that a spool under refusal holds for stored; there AcceptSpool goes on';
