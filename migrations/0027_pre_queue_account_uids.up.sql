-- Whose mail waits in the replicated queue, whatever the account's name means meanwhile: what a deleted account left is not
-- given out as mail of one that was made anew under its name.
-- Lock and duration: ACCESS EXCLUSIVE on replicated_queue, milliseconds: a column without a default writes no row. Older
-- code leaves it NULL; a job fills in who has the name then, and claims pass over the message until it did.

ALTER TABLE postroad.replicated_queue ADD COLUMN account_uid uuid;
COMMENT ON COLUMN postroad.replicated_queue.account_uid IS 'As accounts.uid; NULL where older code stored the message';
GRANT SELECT (uid) ON postroad.accounts TO postroad_fleet;
