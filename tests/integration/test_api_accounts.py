from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from postroad.config.v1 import bundle_pb2
from postroad.control.v1 import account_pb2 as pb
from postroad.control.v1 import account_service_pb2 as service
from support.api import ApiStack, running_api
from support.databases import Database

UUID_1 = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
async def stack(migrated_database: Database) -> AsyncIterator[ApiStack]:
    async with running_api(migrated_database) as running:
        yield running


def create(account: str, request_id: str = "", **fields: Any) -> service.CreateAccountRequest:
    return service.CreateAccountRequest(account_id=account, account=pb.Account(**fields), request_id=request_id)


def update(account: pb.Account, *paths: str, **more: Any) -> service.UpdateAccountRequest:
    return service.UpdateAccountRequest(account=account, update_mask=FieldMask(paths=paths), **more)


async def test_an_account_is_created_read_listed_changed_and_deleted(stack: ApiStack) -> None:
    operator = stack.operator
    made = await operator.account("CreateAccount", create("acme", display_name="Acme", sender_domains=["Acme.Example"]))
    assert (made.name, made.state, made.node_pool) == ("accounts/acme", pb.Account.STATE_ACTIVE, "nodePools/default")
    assert list(made.sender_domains) == ["acme.example"]
    assert made == await operator.account("GetAccount", service.GetAccountRequest(name="accounts/acme"))
    listed = await operator.account("ListAccounts", service.ListAccountsRequest())
    assert list(listed.accounts) == [made]
    made.display_name = "Acme Ltd"
    changed = await operator.account("UpdateAccount", update(made, "display_name"))
    assert changed.display_name == "Acme Ltd"
    assert changed.etag != made.etag
    await operator.account("DeleteAccount", service.DeleteAccountRequest(name=made.name, etag=changed.etag))
    gone = await operator.refused(operator.account("GetAccount", service.GetAccountRequest(name=made.name)))
    assert gone.code is grpc.StatusCode.NOT_FOUND
    assert gone.details["ResourceInfo"].resource_name == "accounts/acme"


async def test_the_account_becomes_a_bundle_with_every_default_filled_in(stack: ApiStack) -> None:
    await stack.operator.account("CreateAccount", create("acme", sender_domains=["acme.example"]))
    (row,) = await stack.as_superuser("SELECT * FROM postroad.config_bundles WHERE bundle = 'accounts/acme'")
    content = bundle_pb2.AccountBundle.FromString(row["content"])
    assert content.account == "accounts/acme"
    assert list(content.sender_domains) == ["acme.example"]
    assert content.retry_policy.base.seconds == 60
    assert content.retry_policy.lifetime.seconds == 432_000
    assert row["revision"] == 1
    assert row["node_pool"] == "default"


async def test_an_edit_that_changes_nothing_of_the_bundle_keeps_its_revision(stack: ApiStack) -> None:
    made = await stack.operator.account("CreateAccount", create("acme"))
    made.display_name = "not in the bundle"
    made = await stack.operator.account("UpdateAccount", update(made, "display_name"))
    (row,) = await stack.as_superuser("SELECT revision FROM postroad.config_bundles WHERE bundle = 'accounts/acme'")
    assert row["revision"] == 1
    made.sender_domains.append("acme.example")
    await stack.operator.account("UpdateAccount", update(made, "sender_domains"))
    rows = await stack.as_superuser(
        "SELECT revision FROM postroad.config_revisions WHERE bundle = 'accounts/acme' ORDER BY revision"
    )
    assert [row["revision"] for row in rows] == [1, 2]


async def test_a_stale_etag_is_aborted_and_a_missing_one_invalid(stack: ApiStack) -> None:
    operator = stack.operator
    made = await operator.account("CreateAccount", create("acme"))
    made.display_name = "first"
    await operator.account("UpdateAccount", update(made, "display_name"))
    stale = await operator.refused(operator.account("UpdateAccount", update(made, "display_name")))
    assert (stale.code, stale.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    made.etag = ""
    missing = await operator.refused(operator.account("UpdateAccount", update(made, "display_name")))
    assert (missing.code, missing.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ETAG_REQUIRED")
    assert missing.fields == ["account.etag"]
    made.etag = "W/nonsense"
    strange = await operator.refused(operator.account("UpdateAccount", update(made, "display_name")))
    assert strange.reason == "ETAG_INVALID"


async def test_an_etag_of_a_former_account_does_not_fit_the_new_one(stack: ApiStack) -> None:
    operator = stack.operator
    former = await operator.account("CreateAccount", create("acme"))
    await operator.account("DeleteAccount", service.DeleteAccountRequest(name=former.name, etag=former.etag))
    await operator.account("CreateAccount", create("acme"))
    error = await operator.refused(
        operator.account("DeleteAccount", service.DeleteAccountRequest(name=former.name, etag=former.etag))
    )
    assert error.code is grpc.StatusCode.ABORTED


async def test_a_repeated_request_id_is_given_the_first_answer_and_changes_nothing(stack: ApiStack) -> None:
    operator = stack.operator
    first = await operator.account("CreateAccount", create("acme", UUID_1, display_name="once"))
    again = await operator.account("CreateAccount", create("acme", UUID_1, display_name="once"))
    assert again == first
    other = await operator.refused(operator.account("CreateAccount", create("acme", UUID_1, display_name="twice")))
    assert (other.code, other.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
    strange = await operator.refused(operator.account("CreateAccount", create("other", "no-uuid")))
    assert strange.reason == "REQUEST_ID_INVALID"


async def test_a_failed_request_leaves_its_request_id_free(stack: ApiStack) -> None:
    operator = stack.operator
    bad = await operator.refused(operator.account("CreateAccount", create("acme", UUID_1, networks=["0.0.0.0/0"])))
    assert bad.fields == ["account.networks[0]"]
    made = await operator.account("CreateAccount", create("acme", UUID_1))
    assert made.name == "accounts/acme"


async def test_validate_only_checks_everything_and_commits_nothing(stack: ApiStack) -> None:
    operator = stack.operator
    request = create("acme", sender_domains=["not a domain"])
    request.validate_only = True
    bad = await operator.refused(operator.account("CreateAccount", request))
    assert bad.reason == "CONFIGURATION_INVALID"
    assert bad.fields == ["account.sender_domains[0]"]
    good = create("acme", sender_domains=["acme.example"])
    good.validate_only = True
    assert (await operator.account("CreateAccount", good)).name == "accounts/acme"
    assert await stack.as_superuser("SELECT 1 FROM postroad.accounts") == []
    assert await stack.as_superuser("SELECT 1 FROM postroad.config_bundles WHERE kind = 1") == []


async def test_masks_choose_fields_and_refuse_unknown_ones(stack: ApiStack) -> None:
    operator = stack.operator
    made = await operator.account("CreateAccount", create("acme", display_name="kept", sender_domains=["a.example"]))
    sent = pb.Account(name=made.name, etag=made.etag, state=pb.Account.STATE_SUSPENDED, sender_domains=["b.example"])
    populated = await operator.account("UpdateAccount", service.UpdateAccountRequest(account=sent))
    assert (populated.display_name, list(populated.sender_domains)) == ("kept", ["b.example"])
    assert populated.state == pb.Account.STATE_ACTIVE
    sent = pb.Account(name=made.name, etag=populated.etag)
    sent.retry_policy.base.CopyFrom(Duration(seconds=5))
    nested = await operator.account("UpdateAccount", update(sent, "retry_policy.base"))
    assert nested.retry_policy.base.seconds == 5
    assert nested.display_name == "kept"
    sent.etag = nested.etag
    everything = await operator.account("UpdateAccount", update(sent, "*"))
    assert (everything.display_name, list(everything.sender_domains)) == ("", [])
    sent.etag = everything.etag
    unknown = await operator.refused(operator.account("UpdateAccount", update(sent, "colour")))
    assert (unknown.code, unknown.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["update_mask"])


async def test_pages_follow_each_other_and_tokens_belong_to_their_list(stack: ApiStack) -> None:
    operator = stack.operator
    for number in range(5):
        await operator.account("CreateAccount", create(f"acme{number}"))
    names, token = [], ""
    for _ in range(3):
        page = await operator.account("ListAccounts", service.ListAccountsRequest(page_size=2, page_token=token))
        names += [account.name for account in page.accounts]
        token = page.next_page_token
    assert names == [f"accounts/acme{number}" for number in range(5)]
    assert token == ""
    page = await operator.account("ListAccounts", service.ListAccountsRequest(page_size=2))
    for bad in ("nonsense", page.next_page_token[:-4] + "AAAA"):
        request = service.ListAccountsRequest(page_token=bad)
        error = await operator.refused(operator.account("ListAccounts", request))
        assert error.reason == "PAGE_TOKEN_INVALID"
    negative = await operator.refused(operator.account("ListAccounts", service.ListAccountsRequest(page_size=-1)))
    assert negative.fields == ["page_size"]


async def test_a_taken_id_exists_already(stack: ApiStack) -> None:
    await stack.operator.account("CreateAccount", create("acme"))
    error = await stack.operator.refused(stack.operator.account("CreateAccount", create("acme")))
    assert error.code is grpc.StatusCode.ALREADY_EXISTS
    assert error.details["ResourceInfo"].resource_name == "accounts/acme"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("mail.example", "mail.example"),
        ("*.example.com", "sub.example.com"),
        ("sub.example.com", "*.example.com"),
        ("*.a.example.com", "*.example.com"),
    ],
)
async def test_a_domain_of_another_account_cannot_be_had_in_whole_or_part(
    stack: ApiStack, mine: str, theirs: str
) -> None:
    await stack.operator.account("CreateAccount", create("first", sender_domains=[theirs]))
    error = await stack.operator.refused(
        stack.operator.account("CreateAccount", create("second", sender_domains=[mine]))
    )
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SENDER_DOMAIN_TAKEN")


async def test_networks_of_two_accounts_never_overlap(stack: ApiStack) -> None:
    await stack.operator.account("CreateAccount", create("first", networks=["10.1.0.0/16"]))
    error = await stack.operator.refused(
        stack.operator.account("CreateAccount", create("second", networks=["10.1.2.0/24"]))
    )
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NETWORK_TAKEN")
    assert error.details["PreconditionFailure"].violations[0].type == "NETWORK_TAKEN"
    (row,) = await stack.as_superuser(
        "SELECT content FROM postroad.config_bundles WHERE bundle = 'pools/default/networks'"
    )
    (binding,) = bundle_pb2.NetworksBundle.FromString(row["content"]).bindings
    assert (binding.network, binding.account) == ("10.1.0.0/16", "accounts/first")


async def test_durability_reaches_the_bundle_and_both_choices_are_kept(stack: ApiStack) -> None:
    plain = await stack.operator.account("CreateAccount", create("plain"))
    assert (plain.durability, plain.uncertain_policy) == (
        pb.Account.DURABILITY_LOCAL,
        pb.Account.UNCERTAIN_POLICY_RETRY,
    )
    request = create("acme", durability=pb.Account.DURABILITY_REPLICATED)
    request.account.uncertain_policy = pb.Account.UNCERTAIN_POLICY_HOLD
    account = await stack.operator.account("CreateAccount", request)
    assert account.uncertain_policy == pb.Account.UNCERTAIN_POLICY_HOLD
    (row,) = await stack.as_superuser("SELECT content FROM postroad.config_bundles WHERE bundle = 'accounts/acme'")
    assert bundle_pb2.AccountBundle.FromString(row["content"]).replicated
    account.durability = pb.Account.DURABILITY_LOCAL
    mask = FieldMask(paths=["durability"])
    changed = await stack.operator.account(
        "UpdateAccount", service.UpdateAccountRequest(account=account, update_mask=mask)
    )
    assert (changed.durability, changed.uncertain_policy) == (
        pb.Account.DURABILITY_LOCAL,
        pb.Account.UNCERTAIN_POLICY_HOLD,
    )


async def test_suspending_is_a_denial_and_resuming_lifts_it(stack: ApiStack) -> None:
    async def version() -> int:
        (row,) = await stack.as_superuser("SELECT version FROM postroad.denial_state")
        return int(row["version"])

    operator = stack.operator
    await operator.account("CreateAccount", create("acme"))
    before = await version()
    request = service.SuspendAccountRequest(name="accounts/acme", reason="abuse")
    suspended = await operator.account("SuspendAccount", request)
    assert (suspended.state, suspended.suspend_reason) == (pb.Account.STATE_SUSPENDED, "abuse")
    moved = await version()
    await operator.account("SuspendAccount", service.SuspendAccountRequest(name="accounts/acme", reason="again"))
    # What is suspended already moves nothing.
    assert before < moved == await version()
    rows = await stack.as_superuser("SELECT denial, kind FROM postroad.denials")
    assert [tuple(row) for row in rows] == [("accounts/acme", 1)]
    resumed = await operator.account("ResumeAccount", service.ResumeAccountRequest(name="accounts/acme"))
    assert (resumed.state, resumed.suspend_reason) == (pb.Account.STATE_ACTIVE, "")
    assert await stack.as_superuser("SELECT 1 FROM postroad.denials") == []
    assert await version() > moved


async def test_an_account_changes_itself_but_not_what_operators_decide(stack: ApiStack) -> None:
    client = await stack.make_account("acme")
    mine = await client.account("GetAccount", service.GetAccountRequest(name="accounts/acme"))
    mine.display_name = "mine"
    mine = await client.account("UpdateAccount", update(mine, "display_name"))
    assert mine.display_name == "mine"
    mine.networks.append("192.0.2.0/24")
    error = await client.refused(client.account("UpdateAccount", update(mine, "networks")))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FIELD_OPERATOR_ONLY")
    error = await client.refused(client.account("UpdateAccount", update(mine, "*")))
    assert error.reason == "FIELD_OPERATOR_ONLY"


async def test_an_account_that_moves_takes_its_bundle_and_networks_along(stack: ApiStack) -> None:
    from postroad.control.v1 import node_service_pb2

    await stack.operator.node("CreateNodePool", node_service_pb2.CreateNodePoolRequest(node_pool_id="other"))
    made = await stack.operator.account("CreateAccount", create("acme", networks=["192.0.2.0/24"]))
    made.node_pool = "nodePools/other"
    await stack.operator.account("UpdateAccount", update(made, "node_pool"))
    rows = await stack.as_superuser(
        "SELECT node_pool, revision, content IS NULL AS deleted FROM postroad.config_bundles"
        " WHERE bundle = 'accounts/acme' ORDER BY node_pool"
    )
    assert [tuple(row) for row in rows] == [("default", 2, True), ("other", 2, False)]
    (row,) = await stack.as_superuser(
        "SELECT content FROM postroad.config_bundles WHERE bundle = 'pools/other/networks'"
    )
    assert len(bundle_pb2.NetworksBundle.FromString(row["content"]).bindings) == 1


async def test_every_change_has_an_audit_row_with_who_and_which_request(stack: ApiStack) -> None:
    made = await stack.operator.account("CreateAccount", create("acme", UUID_1))
    await stack.operator.account("DeleteAccount", service.DeleteAccountRequest(name=made.name, etag=made.etag))
    rows = await stack.as_superuser(
        "SELECT action, principal, request_id FROM postroad.audit_log WHERE table_name = 'accounts' ORDER BY audit_id"
    )
    assert [tuple(row) for row in rows] == [
        ("INSERT", "apiKeys/bootstrap", UUID_1),
        ("DELETE", "apiKeys/bootstrap", ""),
    ]


async def test_deleting_what_is_missing_is_fine_only_when_asked_so(stack: ApiStack) -> None:
    request = service.DeleteAccountRequest(name="accounts/nobody", etag='"00000000-1"')
    error = await stack.operator.refused(stack.operator.account("DeleteAccount", request))
    assert error.code is grpc.StatusCode.NOT_FOUND
    request.allow_missing = True
    await stack.operator.account("DeleteAccount", request)


@pytest.mark.parametrize("bad", ["", "Acme", "9acme", "acme-", "a" * 64, "acme.inc", "*"])
async def test_ids_follow_their_grammar(stack: ApiStack, bad: str) -> None:
    error = await stack.operator.refused(stack.operator.account("CreateAccount", create(bad)))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["account_id"])
