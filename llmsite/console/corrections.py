"""The console's page on which an operator corrects what a tenant or key used in the period of now, with a reason.

The correction itself is ledger/adjusting.py's, as that of `manage.py adjust` and of the operator's API. It leads to
its entry of the ledger.
"""

from __future__ import annotations

from decimal import Decimal

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_http_methods

from accounts.identity import key_rows
from accounts.ledger import adjusting
from accounts.limits.precedence import MAX_LIMIT
from accounts.models import QuotaPeriod
from accounts.pages import console
from llmsite.console.reach import may_run

MAX_COST = Decimal(10**9)


class CorrectionForm(forms.Form):
    """Negative numbers give back."""

    tokens = forms.IntegerField(initial=0, min_value=-MAX_LIMIT, max_value=MAX_LIMIT)
    requests = forms.IntegerField(initial=0, min_value=-MAX_LIMIT, max_value=MAX_LIMIT)
    cost = forms.DecimalField(
        initial=Decimal(0), min_value=-MAX_COST, max_value=MAX_COST, max_digits=18, decimal_places=9
    )
    reason = forms.CharField(max_length=200, label="Reason, which stands in the ledger")


@require_http_methods(["GET", "POST"])
def page(request: HttpRequest, period_id: int) -> HttpResponse:
    """Of a period that is over, the tenant's or key's current one is corrected: what is over stands."""
    if not may_run(request.user):
        raise PermissionDenied
    period = get_object_or_404(QuotaPeriod.objects.select_related("tenant__plan", "key"), pk=period_id)
    form = CorrectionForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        try:
            request_id = adjusting.adjust(period.tenant, period.key, now=timezone.now(), **form.cleaned_data)
        except ValueError as error:
            form.add_error(None, str(error))
        else:
            messages.success(request, f"Corrected: {request_id} in the ledger.")
            return redirect(console.listing("accounts_ledgerentry", q=request_id))
    limits = key_rows.limits_of_periods([period], timezone.now())[period.pk]
    context = {
        **admin.site.each_context(request),
        "title": "Correct what was used",
        "period": period,
        "is_over": period.ends_at <= timezone.now(),
        "used": console.quota_bar(period.used_tokens, limits.monthly_tokens),
        "page_of_period": console.change_page("accounts_quotaperiod", period.pk),
        "form": form,
        "currency": settings.CONFIG.currency,
    }
    return render(request, "console/correction.html", context)
