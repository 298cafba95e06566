"""Who may use which adapter, at which position, and a tenant's own default: the one place that writes those rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max

from accounts.models import Tenant, announce_tenant
from inference.catalog import adapters
from inference.catalog.served import HasTenant, Served
from inference.models import Adapter, AdapterGrant, DefaultVector
from inference.vetting.inspection import RegistrationError


def set_default_vector(
    who: HasTenant | int, served: Served, wanted: adapters.Wanted
) -> tuple[tuple[adapters.GrantedAdapter, float], ...]:
    """From now on this tenant's requests for this model that name no adapter have these; those not named have none.

    Aliases have no place in it. Raises Refusal as adapters.choose does; then nothing has changed. Idempotent, and
    silent where nothing changes.
    """
    tenant_id = who if isinstance(who, int) else who.tenant_id
    chosen = [(adapter, scale) for adapter, scale in adapters.named(who, served, wanted) if scale != 0.0]
    scales = [[adapter.id, scale] for adapter, scale in chosen]
    rows = DefaultVector.objects.filter(tenant_id=tenant_id, base_model_id=served.id)
    present = rows.first()
    if (present.scales if present else []) == scales:
        return tuple(chosen)
    with transaction.atomic():
        if scales:
            DefaultVector.objects.update_or_create(
                tenant_id=tenant_id, base_model_id=served.id, defaults={"scales": scales}
            )
        else:
            rows.delete()
        _changed_for(tenant_id)
    return tuple(chosen)


def grant(adapter: Adapter, tenant: Tenant, position: int | None = None) -> AdapterGrant:
    """The tenant may use it from now on, at a free position or at that after its last one. Idempotent: what is granted
    keeps its position. Raises RegistrationError."""
    try:
        with transaction.atomic():
            Tenant.objects.select_for_update().get(pk=tenant.pk)  # positions of one tenant are given one by one
            present = AdapterGrant.objects.filter(adapter=adapter, tenant=tenant).first()
            if present is not None:
                return present
            last = AdapterGrant.objects.filter(tenant=tenant, base_model=adapter.base_model_id).aggregate(
                last=Max("position", default=-1)
            )["last"]
            place = last + 1 if position is None else position
            made = AdapterGrant.objects.create(
                adapter=adapter, tenant=tenant, base_model_id=adapter.base_model_id, position=place
            )
            _changed_for(tenant.pk)
            return made
    except IntegrityError as error:
        raise RegistrationError("conflict", "The registry was changed at the same moment. Try again.") from error


def revoke(adapter: Adapter, tenant: Tenant) -> bool:
    """Whether it was granted. The other adapters of the tenant keep their positions; its default loses this one."""
    with transaction.atomic():
        count, _ = AdapterGrant.objects.filter(adapter=adapter, tenant=tenant).delete()
        if count:
            leave_defaults([adapter.pk], DefaultVector.objects.filter(tenant=tenant))
            _changed_for(tenant.pk)
    return count > 0


def leave_defaults(pks: Sequence[int], rows: Any) -> None:
    """These adapters are in no default vector of `rows` any more."""
    for row in rows.select_for_update():
        scales = [pair for pair in row.scales if pair[0] not in pks]
        if scales != row.scales:
            row.scales = scales
            row.save(update_fields=["scales", "updated_at"])


def _changed_for(tenant_id: int) -> None:
    """Every process reads this tenant's adapters anew once the transaction has committed."""
    adapters.forget()
    transaction.on_commit(adapters.forget)
    announce_tenant(tenant_id)
