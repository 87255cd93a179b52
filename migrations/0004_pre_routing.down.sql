DROP TABLE postroad.routing_rule_targets;
DROP TABLE postroad.routing_rules;
DROP TABLE postroad.providers;
