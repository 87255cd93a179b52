DROP TABLE postroad.queue_entries;
