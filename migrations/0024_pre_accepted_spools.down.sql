COMMENT ON COLUMN postroad.spools.reported_acknowledged IS NULL;
ALTER TABLE postroad.spools RENAME COLUMN reported_acknowledged TO reported_last_record;
