-- An old copy of a spool's disk is told from the live one by the id of the opening that reported last.
-- Lock and duration: ACCESS EXCLUSIVE on a small table, milliseconds: the columns have no value, so no row is written. Older
-- code names its columns and does not notice; what it takes meanwhile leaves an older id, which the spool keeps for 16 more.

ALTER TABLE postroad.spools
    ADD COLUMN opening bytea,
    ADD COLUMN reported_opening bytea;
COMMENT ON COLUMN postroad.spools.opening IS
    'Of the opening that reported last; none before the first. AcceptSpool copies reported_opening over it';
