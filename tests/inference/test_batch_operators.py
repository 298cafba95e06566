"""What an operator sees of batches and files, and may do: the console, the operator's API, the purge. Never content."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.core.management import call_command
from django.test import Client as Browser
from django.urls import reverse
from django.utils import timezone

from inference.batches import files
from inference.batches.models import Batch, BatchLine, StoredFile

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
SECRET = "the words of Alice"


@pytest.fixture(autouse=True)
def _no_files() -> Iterator[None]:
    import shutil

    yield
    shutil.rmtree(files.folder(), ignore_errors=True)


def make_file(customer: Any, **values: Any) -> StoredFile:
    with files.scratch(customer.tenant.pk) as place:
        with files.create(place) as file:
            file.write(SECRET.encode())
        given = {"purpose": "batch", "filename": "q.jsonl", "expires_at": timezone.now() + timedelta(days=1)}
        row = StoredFile(
            id=files.new_id("file-"),
            tenant=customer.tenant,
            key=customer.key,
            size_bytes=len(SECRET),
            **{**given, **values},
        )
        return files.keep(place, row)


def make_batch(customer: Any, file: StoredFile, **values: Any) -> Batch:
    given = {"status": "in_progress", "num_lines": 2, "num_completed": 1, "expires_at": timezone.now()}
    batch = Batch.objects.create(
        id=files.new_id("batch_"),
        tenant=customer.tenant,
        key=customer.key,
        endpoint="/v1/completions",
        input_file_id=file.id,
        **{**given, **values},
    )
    BatchLine.objects.create(batch=batch, number=1, custom_id="a", offset=0, size_bytes=1, answer=SECRET)
    return batch


def test_before_several_batches_are_cancelled_the_page_says_whose_they_are_and_how_far(
    cast: Any, admin_client: Browser
) -> None:
    rows = [make_batch(who, make_file(who)) for who in (cast.alice, cast.bob)]
    data = {"action": "cancel", "_selected_action": [row.pk for row in rows]}
    page = admin_client.post(reverse("admin:inference_batch_changelist"), data).content.decode()
    assert page.count("in_progress, 1 of 2 lines done") == 2
    assert "of Alice&#x27;s" in page and "of Bob&#x27;s" in page
    assert not Batch.objects.filter(status="cancelling").exists()


def test_the_console_lists_batches_and_cancels_them(cast: Any, admin_client: Browser) -> None:
    file = make_file(cast.alice)
    batch, ended = make_batch(cast.alice, file), make_batch(cast.alice, file, status="completed")
    for model, row in (("batch", batch), ("storedfile", file)):
        listed = admin_client.get(reverse(f"admin:inference_{model}_changelist")).content.decode()
        shown = admin_client.get(reverse(f"admin:inference_{model}_change", args=[quote(row.pk)])).content.decode()
        assert row.pk in listed
        assert row.pk in shown
        assert SECRET not in listed + shown
    assert (
        "1 of 2 done" in listed
        or "1 of 2 done" in admin_client.get(reverse("admin:inference_batch_changelist")).content.decode()
    )
    data = {"action": "cancel", "_selected_action": [batch.pk, ended.pk], "previewed": "yes"}
    answer = admin_client.post(reverse("admin:inference_batch_changelist"), data, follow=True)
    assert "1 cancelled" in answer.content.decode()
    batch.refresh_from_db()
    ended.refresh_from_db()
    assert (batch.status, batch.ends_as, ended.status) == ("cancelling", "cancelled", "completed")


def test_operators_list_and_cancel_by_api_and_tenants_do_not(cast: Any, client: Browser) -> None:
    batch = make_batch(cast.alice, make_file(cast.alice))
    operator = {"headers": cast.operator.headers}
    (found,) = client.get("/v1/admin/batches", **operator).json()["results"]
    assert (found["id"], found["tenant"], found["num_completed"]) == (batch.id, "Alice's", 1)
    assert client.get("/v1/admin/batches", headers=cast.alice.headers).status_code == 403
    assert client.post(f"/v1/admin/batches/{batch.id}/cancel", **operator).json()["status"] == "cancelling"
    assert client.post(f"/v1/admin/batches/{batch.id}/cancel", **operator).status_code == 409


def test_the_purge_removes_what_is_over_and_nothing_that_is_in_use(cast: Any) -> None:
    now = timezone.now()
    over = {"expires_at": now - timedelta(seconds=1)}
    kept, expired, busy = make_file(cast.alice), make_file(cast.alice, **over), make_file(cast.bob, **over)
    make_batch(cast.bob, busy)
    old = make_batch(cast.alice, kept, status="completed", created_at=now - timedelta(days=400))
    stray, fresh = (files.path_of(cast.alice.tenant.pk, name) for name in ("part-old", "part-new"))
    for path in (stray, fresh):
        path.write_text("x")
    os.utime(stray, (time.time() - files.ABANDONED_SECONDS - 1,) * 2)
    out = StringIO()
    call_command("purge_files", "--json", stdout=out)
    assert json.loads(out.getvalue()) == {"files": 1, "batches": 1, "strays": 1}
    assert set(StoredFile.objects.values_list("pk", flat=True)) == {kept.id, busy.id}
    assert not files.path_of(expired.tenant_id, expired.id).exists()
    assert not stray.exists()
    assert all(path.exists() for path in (fresh, files.path_of(kept.tenant_id, kept.id)))
    assert not Batch.objects.filter(pk=old.pk).exists()
    assert BatchLine.objects.count() == 1
    call_command("purge_files", stdout=(out := StringIO()))
    assert out.getvalue() == "0 files, 0 batches, 0 strays removed.\n"
