"""The rows of a large installation, in bulk: nobody is told of them, no audit entry is written for them.

Deterministic but for the keys' secrets and the moment they count back from. A tenant that is larger than all others and
one with next to nothing are the hard cases: lists that go along an index to find the few rows of the second go far.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from django.contrib.auth.models import Group, User
from django.db import connection

from accounts.identity import issuing
from accounts.models import (
    APIKey,
    AuditEntry,
    LimitRule,
    Membership,
    Plan,
    Price,
    QuotaRaise,
    Scope,
    StaffRole,
    Tenant,
)
from inference.batches.models import Batch, StoredFile
from inference.bench.lists import usage_rows
from inference.bench.lists.bulk import Tell, Writer
from inference.bench.lists.sizes import LARGEST_SHARE, Sizes
from inference.imports.models import ModelImport
from inference.models import Adapter, AdapterAlias, AdapterGrant, DefaultVector, ModelVariant, ServedModel
from inference.tuning.models import Optimization


@dataclass(slots=True)
class Filled:
    """Whom and what the lists are asked for."""

    largest: Tenant
    smallest: Tenant
    superuser: User
    owner_of_largest: User
    owner_of_smallest: User
    tenant_key: str = field(repr=False)
    operator_key: str = field(repr=False)


def fill(sizes: Sizes, now: datetime, tell: Tell) -> Filled:
    """All rows, in a database that may have some already. Minutes for 100,000 keys."""
    writer = Writer(tell, random.Random(sizes.keys), f"{sizes.keys}-{uuid.uuid4().hex[:6]}")
    plans = writer.write(Plan, sizes.plans, lambda i: Plan(name=writer.name("plan", i), monthly_tokens=10**9))
    tenants = writer.write(
        Tenant,
        sizes.tenants,
        lambda i: Tenant(
            name=writer.name("tenant", i),
            plan_id=plans[i % len(plans)],
            status="suspended" if i % 50 == 48 else "active",
            created_at=now - timedelta(minutes=i),
        ),
    )
    keys = _keys(writer, sizes, tenants, now)
    usage_rows.write(writer, sizes, keys, now)
    _people_and_limits(writer, sizes, tenants, keys, now)
    _models(writer, sizes, tenants, now)
    _files(writer, sizes, keys, now)
    writer.write(AuditEntry, sizes.audit, lambda i: _audit(writer, i, keys, now))
    _settle_statistics()
    return _people(tenants[0], tenants[-1], writer)


def _settle_statistics() -> None:
    """As autovacuum does it after such a load; SQLite plans without statistics, in an installation, too."""
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("VACUUM ANALYZE")


# Keys


def _keys(writer: Writer, sizes: Sizes, tenants: Sequence[int], now: datetime) -> list[tuple[int, int]]:
    """(key, tenant): a share to the first tenant, none to the last, the rest in turn."""
    of_first = int(sizes.keys * LARGEST_SHARE)
    others = itertools.cycle(tenants[1:-1])
    owners = [tenants[0] if number < of_first else next(others) for number in range(sizes.keys)]
    writer.chance.shuffle(owners)
    owners[owners.index(tenants[0])], owners[0] = owners[0], tenants[0]  # whose days of usage there are in any case
    ids = writer.write(
        APIKey,
        sizes.keys,
        lambda i: APIKey(
            tenant_id=owners[i],
            name=writer.name("key", i),
            public_id=uuid.uuid4().hex[:12],
            secret_hash="0" * 64,
            pepper_id="none",
            created_at=now - timedelta(minutes=sizes.keys - i),
            last_used_at=None if i % 3 else now - timedelta(minutes=i),
            revoked_at=None if i % 10 else now,
            expires_at=None if i % 7 else now + timedelta(days=i % 90),
        ),
    )
    return list(zip(ids, owners, strict=True))


def _people(largest: int, smallest: int, writer: Writer) -> Filled:
    def owner(tenant: Tenant) -> User:
        user = User.objects.create(username=writer.name("owner of", tenant.pk))
        Membership.objects.create(tenant=tenant, user=user, role="owner")
        return user

    first, last = Tenant.objects.get(pk=largest), Tenant.objects.get(pk=smallest)
    superuser = User.objects.create(username=writer.name("superuser", 0), is_staff=True, is_superuser=True)
    return Filled(
        largest=first,
        smallest=last,
        superuser=superuser,
        owner_of_largest=owner(first),
        owner_of_smallest=owner(last),
        tenant_key=issuing.issue(first, "lists")[1],
        operator_key=issuing.issue(last, "lists", [Scope.OPERATOR.value])[1],
    )


def _people_and_limits(
    writer: Writer, sizes: Sizes, tenants: Sequence[int], keys: Sequence[tuple[int, int]], now: datetime
) -> None:
    users = writer.write(User, sizes.tenants, lambda i: User(username=writer.name("person", i)))
    writer.write(
        Membership, sizes.tenants, lambda i: Membership(tenant_id=tenants[i], user_id=users[i], created_at=now)
    )
    writer.write(StaffRole, sizes.staff, lambda i: StaffRole(user_id=users[i], role="auditor", created_at=now))
    writer.write(Group, sizes.staff, lambda i: Group(name=writer.name("group", i)))
    writer.write(
        LimitRule,
        sizes.rules,
        lambda i: LimitRule(key_id=keys[i][0], limit="max_output", value=100 + i, starts_at=now, created_at=now),
    )
    writer.write(
        QuotaRaise,
        sizes.raises,
        lambda i: QuotaRaise(
            tenant_id=tenants[i % len(tenants)],
            monthly_tokens=10**9 + i,
            reason="grows",
            state="asked" if i % 9 == 0 else "refused",
            asked_by=writer.name("person", i),
            asked_at=now - timedelta(hours=i),
        ),
    )


def _audit(writer: Writer, number: int, keys: Sequence[tuple[int, int]], now: datetime) -> AuditEntry:
    key = keys[number % len(keys)][0]
    return AuditEntry(
        action="delete" if number % 1000 == 0 else "change" if number % 3 else "create",
        actor_kind="key" if number % 1000 == 0 else "person",
        actor=writer.name("person", number % 97),
        model="accounts.apikey",
        row=str(key),
        name=writer.name("key", number),
        diff={"name": ["before", "after"]},
        created_at=now - timedelta(minutes=len(keys) - number),
    )


# Models, adapters, files


def _models(writer: Writer, sizes: Sizes, tenants: Sequence[int], now: datetime) -> None:
    names = [f"model-{number:03}-{writer.mark}" for number in range(sizes.models)]
    metadata = {"quantization": "Q8_0", "context_length": 8192, "block_count": 30, "embedding_length": 576}
    models = writer.write(
        ServedModel,
        sizes.models,
        lambda i: ServedModel(
            name=names[i], path=f"/models/{i}.gguf", digest=f"{i:064}", size_bytes=10**8, metadata=metadata
        ),
    )
    writer.write(
        ModelVariant,
        sizes.models,
        lambda i: ModelVariant(
            base_model_id=models[i],
            name="small",
            source_digest=f"{i:064}",
            path=f"/models/{i}-small.gguf",
            digest="1" * 64,
            metadata=metadata,
            is_active=i % 2 == 0,
        ),
    )
    adapters = writer.write(
        Adapter,
        sizes.adapters,
        lambda i: Adapter(
            name=f"adapter-{i:04}",
            base_model_id=models[i % len(models)],
            path=f"/adapters/{i}.gguf",
            digest=f"{i:064}",
            rank=8,
            owner_id=tenants[i % len(tenants)] if i % 2 else None,
            created_at=now,
        ),
    )
    writer.write(
        AdapterAlias,
        sizes.adapters,
        lambda i: AdapterAlias(
            name=f"alias-{i:04}", base_model_id=models[i % len(models)], target_id=adapters[i], created_at=now
        ),
    )
    writer.write(
        ModelImport,
        sizes.adapters,
        lambda i: ModelImport(
            name=f"import-{i:04}",
            base_model_id=models[i % len(models)],
            state="ready" if i % 3 else "refused",
            total_bytes=10**8,
            received_bytes=10**8,
            asked_by_kind="person",
            asked_by=writer.name("person", i % 97),
            created_at=now,
        ),
    )
    writer.write(
        Optimization,
        sizes.adapters,
        lambda i: Optimization(
            name=names[i % len(names)],
            base_model_id=models[i % len(models)],
            state="failed",
            problem="the file is no model",
            asked_by_kind="person",
            asked_by=writer.name("person", i % 97),
            created_at=now,
        ),
    )
    positions: dict[tuple[int, int], int] = {}

    def grant(number: int) -> AdapterGrant:
        tenant, place = tenants[number % len(tenants)], number % len(adapters)
        model = models[place % len(models)]
        positions[tenant, model] = position = positions.get((tenant, model), -1) + 1
        return AdapterGrant(tenant_id=tenant, adapter_id=adapters[place], base_model_id=model, position=position)

    writer.write(AdapterGrant, sizes.tenants, grant)
    writer.write(
        DefaultVector,
        sizes.tenants,
        lambda i: DefaultVector(
            tenant_id=tenants[i], base_model_id=models[i % len(models)], scales=[[adapters[i % len(adapters)], 0.5]]
        ),
    )
    writer.write(
        Price,
        sizes.models,
        lambda i: Price(model=names[i], valid_from=now, input_per_million=1, output_per_million=2, created_at=now),
    )


def _files(writer: Writer, sizes: Sizes, keys: Sequence[tuple[int, int]], now: datetime) -> None:
    statuses = ("completed", "in_progress", "failed", "completed", "cancelled")

    def times(number: int) -> dict[str, datetime]:
        return {"created_at": now - timedelta(minutes=number), "expires_at": now + timedelta(days=1)}

    def batch(number: int) -> Batch:
        key, tenant = keys[number]
        return Batch(
            id=f"batch_{uuid.uuid4().hex}",
            tenant_id=tenant,
            key_id=key,
            endpoint="/v1/chat/completions",
            input_file_id="file-x",
            status=statuses[number % len(statuses)],
            num_lines=100,
            num_completed=number % 90,
            num_failed=number % 7,
            **times(number),
        )

    def stored(number: int) -> StoredFile:
        key, tenant = keys[number]
        return StoredFile(
            id=f"file-{uuid.uuid4().hex}",
            tenant_id=tenant,
            key_id=key,
            purpose="batch" if number % 3 else "batch_output",
            filename="input.jsonl",
            size_bytes=number,
            **times(number),
        )

    writer.write(Batch, sizes.batches, batch)
    writer.write(StoredFile, sizes.batches, stored)
