"""What a violated constraint means to the caller: one table from names of constraints to errors of the domain.

Contract. `domain_error(constraint, name)` gives the error for a constraint that a request can reach, `name` being the
resource that the request is about; None for one that only a bug of ours can reach. Names of constraints are part of the
schema's interface; a test walks the catalog so that none is left out of here.
"""

from __future__ import annotations

from controlplane.domain.errors import (
    AlreadyExistsError,
    ControlPlaneError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
    invalid,
)

_ALREADY_EXISTS = frozenset(
    {
        "pk_accounts",
        "pk_node_pools",
        "pk_nodes",
        "pk_routing_rules",
        "pk_smtp_credentials",
        "uq_api_keys_account_api_key",
        "uq_limit_policies_account_limit_id",
        "uq_providers_account_provider",
    }
)

_PRECONDITIONS = {
    "uq_account_sender_domains_domain": (Reason.SENDER_DOMAIN_TAKEN, "a sender domain belongs to another account"),
    "ex_account_networks_network": (Reason.NETWORK_TAKEN, "a network overlaps another one"),
    "fk_accounts_node_pool": (Reason.NODE_POOL_MISSING, "the node pool does not exist"),
    "fk_nodes_node_pool": (Reason.NODE_POOL_MISSING, "the node pool does not exist"),
    "uq_limit_policies_account_scope_unit_at_once_subject": (
        Reason.LIMIT_TAKEN,
        "another limit of its owner counts the same",
    ),
    "fk_routing_rule_targets_provider": (Reason.PROVIDER_IN_USE, "a routing rule names the provider"),
}

# A parent that went away between the check and the write.
_NOT_FOUND = frozenset(
    {
        "fk_account_networks_account",
        "fk_account_sender_domains_account",
        "fk_api_keys_account",
        "fk_limit_policies_account",
        "fk_providers_account",
        "fk_routing_rule_targets_routing_rule",
        "fk_routing_rules_account",
        "fk_smtp_credentials_account",
        "fk_suspended_destinations_account",
        "fk_enrollment_tokens_node",
        "fk_pool_keys_node_pool",
    }
)

# Duplicates inside one request.
_DUPLICATES = {
    "pk_account_sender_domains": "account.sender_domains",
    "pk_account_networks": "account.networks",
}

# Only a defect of ours, or one in 2^128, gets there; or the fleet's side writes them.
UNREACHABLE = frozenset(
    {
        "ck_audit_log_action",
        "ck_book_findings_kind",
        "ck_book_start_one",
        "ck_commands_verb",
        "ck_config_bundles_content",
        "ck_config_bundles_kind",
        "ck_delivery_events_type",
        "ck_denial_state_singleton",
        "ck_denials_kind",
        "ck_enrollment_tokens_expire_time",
        "ck_node_drains_undrained",
        "ck_node_status_config_status",
        "ck_nodes_certificate",
        "ck_queue_recipients_state",
        "ck_recipients_state",
        "ck_replicated_queue_claim",
        "ck_replicated_queue_epoch",
        "ck_schema_compat_singleton",
        "ck_spools_cursor",
        "ck_submission_keys_content_hash",
        "ck_submission_keys_key_hash",
        "fk_handovers_spool",
        "fk_node_status_node",
        "fk_spools_node",
        "pk_api_keys",
        "pk_audit_log",
        "pk_book_comparisons",
        "pk_book_entries",
        "pk_book_findings",
        "pk_book_start",
        "pk_books",
        "pk_commands",
        "pk_config_bundles",
        "pk_config_revisions",
        "pk_delivery_events",
        "pk_denial_state",
        "pk_denials",
        "pk_drain_targets",
        "pk_enrollment_tokens",
        "pk_former_accounts",
        "pk_given_up_spools",
        "pk_handover_contents",
        "pk_handovers",
        "pk_idempotency",
        "pk_ledger_rejects",
        "pk_limit_policies",
        "pk_messages",
        "pk_node_drains",
        "pk_node_leases",
        "pk_node_status",
        "pk_pool_keys",
        "pk_providers",
        "pk_queue_contents",
        "pk_queue_entries",
        "pk_queue_recipients",
        "pk_recipients",
        "pk_replicated_queue",
        "pk_routing_rule_targets",
        "pk_schema_compat",
        "pk_schema_migrations",
        "pk_spools",
        "pk_submission_keys",
        "pk_suspended_destinations",
        "uq_accounts_uid",
        "uq_api_keys_lookup",
        "uq_node_pools_uid",
        "uq_nodes_uid",
        "uq_routing_rules_uid",
        "uq_smtp_credentials_uid",
        # Suspending again is an update.
        "uq_suspended_destinations_account_destination",
    }
)

# Every check on a table that callers write is named after the field it guards, in the resource that requests call so.
_CHECKED_TABLES = {
    "account_networks": "account",
    "account_sender_domains": "account",
    "accounts": "account",
    "api_keys": "api_key",
    "limit_policies": "limit",
    "node_pools": "node_pool",
    "nodes": "node",
    "providers": "provider",
    "routing_rule_targets": "routing_rule",
    "routing_rules": "routing_rule",
    "smtp_credentials": "smtp_credential",
    "suspended_destinations": "destination",
}


def domain_error(constraint: str, name: str) -> ControlPlaneError | None:
    """Return what to tell the caller whose request about `name` met `constraint`."""
    if constraint in UNREACHABLE:
        return None
    if constraint in _ALREADY_EXISTS:
        return AlreadyExistsError(name)
    if constraint in _NOT_FOUND:
        return NotFoundError(name)
    if constraint in _PRECONDITIONS:
        reason, text = _PRECONDITIONS[constraint]
        return FailedPreconditionError(reason, text, subject=name)
    if constraint in _DUPLICATES:
        return invalid(_DUPLICATES[constraint], "has a duplicate")
    for table, resource in _CHECKED_TABLES.items():
        if constraint.startswith(f"ck_{table}_"):
            return invalid(f"{resource}.{constraint.removeprefix(f'ck_{table}_')}", "is out of its limits")
    return None
