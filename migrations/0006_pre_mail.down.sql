DROP FUNCTION postroad.drop_partitions(date);
DROP FUNCTION postroad.ensure_partitions(date, integer);
DROP FUNCTION postroad.message_id_bound(date);
DROP TABLE postroad.ledger_rejects;
DROP TABLE postroad.commands;
DROP TABLE postroad.delivery_events;
DROP TABLE postroad.recipients;
DROP TABLE postroad.messages;
DROP SEQUENCE postroad.ledger_position;
