COMMENT ON COLUMN postroad.spools.resume_record IS NULL;
ALTER TABLE postroad.spools RENAME COLUMN resume_record TO reported_last_record;
