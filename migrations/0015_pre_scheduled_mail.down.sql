DROP FUNCTION postroad.drop_partitions(date, date[]);
ALTER TABLE postroad.messages DROP COLUMN priority, DROP COLUMN send_time;
