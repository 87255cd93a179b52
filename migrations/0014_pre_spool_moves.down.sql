DROP TRIGGER audit_node ON postroad.spools;
ALTER TABLE postroad.spools
    DROP COLUMN lost_messages,
    DROP COLUMN lost_count,
    DROP COLUMN unnamed_losses;
