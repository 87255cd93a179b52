"""PostgreSQL: one repository per aggregate, the migration runner, the change feed."""
