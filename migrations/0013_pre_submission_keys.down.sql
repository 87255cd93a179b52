ALTER TABLE postroad.messages DROP COLUMN duplicate_of;
DROP TABLE postroad.submission_keys;
