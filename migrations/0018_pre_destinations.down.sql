DROP FUNCTION postroad.denial_receipts(text, smallint);
ALTER TABLE postroad.node_status DROP COLUMN destinations_version;
-- The owner, too, sees no rows while row-level security is forced.
ALTER TABLE postroad.denials NO FORCE ROW LEVEL SECURITY;
DELETE FROM postroad.denials WHERE kind = 4;
ALTER TABLE postroad.denials FORCE ROW LEVEL SECURITY;
UPDATE postroad.denial_state SET version = version + 1;
ALTER TABLE postroad.denials
    DROP CONSTRAINT ck_denials_kind,
    ADD CONSTRAINT ck_denials_kind CHECK (kind BETWEEN 1 AND 3);
DROP TABLE postroad.suspended_destinations;
