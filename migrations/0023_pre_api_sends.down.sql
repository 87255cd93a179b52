ALTER TABLE postroad.messages DROP COLUMN metadata, DROP COLUMN tags;
