"""What roles mean on the console's pages: rows, fields, filters, choices and actions, for all models at once.

`guarded` is put before each admin class by the console's site when the class is registered (llmsite/console/site.py):
no page can forget it. People of a tenant get 404 for rows of others, as if they were not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import ForeignKey, ManyToManyField, Model, QuerySet
from django.http import Http404, HttpRequest

from accounts.identity import roles
from accounts.models import Tenant
from accounts.pages.bulk_preview import previewed
from accounts.pages.long_lists import LongList

DELETE_SELECTED = "delete_selected"
STOCK_PAGES = ("changelist", "add", "history", "delete", "change", "autocomplete")


class RoleMixin(LongList):
    """Stands before a ModelAdmin in the order of its methods. A subclass may only narrow what `super()` allows."""

    @property
    def _label(self) -> str:
        return str(self.model._meta.label_lower)

    def _is_of_tenants(self, request: HttpRequest) -> bool:
        return roles.is_of_tenants(request.user, self._label)

    # Rows

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return roles.visible(request.user, super().get_queryset(request))

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_view_permission(request, obj) and self._may(request, "view", obj)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_change_permission(request, obj) and self._may(request, "change", obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_delete_permission(request, obj) and self._may(request, "delete", obj)

    def _may(self, request: HttpRequest, verb: str, obj: Any) -> bool:
        """`obj` is a row, none, or a row's number (django-unfold's buttons). What this row is asked often is kept."""
        if obj is None or (roles.reach(request.user, self._label, verb) is None and self._label != "auth.user"):
            return roles.reach(request.user, self._label, verb) != frozenset()
        pk = obj.pk if isinstance(obj, Model) else unquote(str(obj))
        known: dict[Any, bool] = request.__dict__.setdefault("_llmsite_may", {})
        name = (self._label, verb, str(pk))
        if name not in known:
            try:
                rows = self.model._default_manager.filter(pk=pk)
            except (ValueError, ValidationError):
                return False
            known[name] = roles.visible(request.user, rows, verb).exists()
        return known[name]

    def _get_obj_does_not_exist_redirect(self, request: HttpRequest, opts: Any, object_id: str) -> Any:
        """Django would go to the dashboard with a message. Raises Http404."""
        raise Http404

    # Fields and filters

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        return _without(super().get_fieldsets(request, obj), self._hidden(request, obj))

    def get_list_display(self, request: HttpRequest) -> Any:
        hidden = self._hidden(request)
        return [name for name in super().get_list_display(request) if name not in hidden]

    def _hidden(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        hidden: tuple[str, ...] = () if self.has_change_permission(request, obj) else roles.SECRETS
        row = roles.BY_MODEL.get(self._label)
        if row is not None and self._is_of_tenants(request):
            hidden += row.hidden
        if self._label == "auth.user" and not request.user.is_superuser:
            hidden += ("password", "is_staff", "is_superuser", "groups", "user_permissions")
        return hidden

    def get_list_filter(self, request: HttpRequest) -> Any:
        """A filter's choices are rows of others: people of a tenant keep those of the row's own words."""
        filters = super().get_list_filter(request)
        return [each for each in filters if self._may_filter(each)] if self._is_of_tenants(request) else filters

    def _may_filter(self, each: Any) -> bool:
        if isinstance(each, str):
            return "__" not in each and not self.model._meta.get_field(each).is_relation
        return isinstance(each, type) and getattr(each, "for_tenants", False)

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        """No filter is an oracle: not for hashes, and not for what stands behind a tenant's own rows."""
        parts = lookup.split("__")
        if any(secret in parts for secret in roles.SECRETS):
            return False
        if self._is_of_tenants(request):
            hidden = self._hidden(request)
            return parts[0] not in hidden and parts[1:] in ([], ["exact"], ["id", "exact"], ["isnull"], ["gte"], ["lt"])
        return bool(super().lookup_allowed(lookup, value, request))

    def get_inline_instances(self, request: HttpRequest, obj: Any = None) -> Any:
        """Rows within a page, for those who may see all of their kind: people of a tenant have lists of their own."""
        inlines = super().get_inline_instances(request, obj)
        return [each for each in inlines if not roles.is_of_tenants(request.user, each.model._meta.label_lower)]

    # What is written

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        """Forms know for whom they are: `self.user`."""
        form = super().get_form(request, obj, change=change, **kwargs)
        return type(form.__name__, (form,), {"user": request.user, "__module__": form.__module__})

    def formfield_for_foreignkey(self, db_field: ForeignKey[Any, Any], request: Any, **kwargs: Any) -> Any:
        kwargs["queryset"] = self._choices(db_field, request, kwargs.get("queryset"))
        return super().formfield_for_foreignkey(db_field, request, **kwargs)

    def formfield_for_manytomany(self, db_field: ManyToManyField[Any, Any], request: Any, **kwargs: Any) -> Any:
        kwargs["queryset"] = self._choices(db_field, request, kwargs.get("queryset"))
        return super().formfield_for_manytomany(db_field, request, **kwargs)

    def _choices(self, db_field: Any, request: HttpRequest, given: QuerySet[Any] | None) -> QuerySet[Any]:
        """Rows that a person may refer to; of tenants, those in which they may add such a row."""
        other = db_field.remote_field.model
        rows = other._default_manager.all() if given is None else given
        added, changed = (roles.reach(request.user, self._label, verb) for verb in ("add", "change"))
        if added is None or changed is None:
            return rows
        return rows.filter(pk__in=added) if other is Tenant else roles.visible(request.user, rows)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """The last word, whatever the form let pass. Raises PermissionDenied."""
        tenants = roles.reach(request.user, self._label, "change" if change else "add")
        if tenants is not None and getattr(obj, "tenant_id", None) not in tenants:
            raise PermissionDenied
        if change and not self._may(request, "change", obj):
            raise PermissionDenied
        super().save_model(request, obj, form, change)

    def get_actions(self, request: HttpRequest) -> Any:
        """Each shows first what it would change; deleting does so by itself."""
        found: Any = super().get_actions(request)
        return {
            name: (action if name == DELETE_SELECTED else previewed(action, name, title), name, title)
            for name, (action, _, title) in found.items()
        }

    def response_action(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:  # type: ignore[override]
        """Actions see rows that the person may do it with, not all that they may see: an auditor who owns a tenant sees
        the rows of every tenant, and changes their own."""
        name = request.POST.get("action", "")
        chosen = self.get_actions(request).get(name)
        allowed = (
            ("delete",) if name == DELETE_SELECTED else getattr(chosen[0], "allowed_permissions", ()) if chosen else ()
        )
        verbs = [verb for verb in allowed if verb in roles.VERBS]
        if not verbs and self._is_of_tenants(request):
            verbs = ["change"]
        for verb in verbs:
            queryset = roles.visible(request.user, queryset, verb)
        return super().response_action(request, queryset)

    # Pages of a row that are not Django's own

    def get_urls(self) -> list[Any]:
        return [self._guard(pattern) for pattern in super().get_urls()]

    def _guard(self, pattern: Any) -> Any:
        prefix = f"{self.model._meta.app_label}_{self.model._meta.model_name}_"
        name = (getattr(pattern, "name", "") or "").removeprefix(prefix)
        if name and name not in STOCK_PAGES:
            pattern.callback = self._asking_first(pattern.callback, name)
        return pattern

    def _asking_first(self, view: Callable[..., Any], name: str) -> Callable[..., Any]:
        """404 for rows that are not there for this person; then what the button's own permissions say of the row."""

        @functools.wraps(view)
        def asked(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            pk = kwargs.get("object_id")
            if pk is not None and self.admin_site.has_permission(request):
                if not self._may(request, "view", pk):
                    raise Http404
                needed = getattr(getattr(self, name, None), "allowed_permissions", ())
                if not all(self._may(request, verb, pk) for verb in needed if verb in roles.VERBS):
                    raise PermissionDenied
            return view(request, *args, **kwargs)

        return asked


def guarded(admin_class: type[admin.ModelAdmin[Any]]) -> type[admin.ModelAdmin[Any]]:
    """The class with RoleMixin before it; the same class if it has it."""
    if issubclass(admin_class, RoleMixin):
        return admin_class
    name = admin_class.__name__
    return type(name, (RoleMixin, admin_class), {"__module__": admin_class.__module__, "__doc__": admin_class.__doc__})


def _without(fieldsets: Any, hidden: tuple[str, ...]) -> Any:
    """The fieldsets without some fields, which may stand in groups; an empty part goes."""
    if not hidden:
        return fieldsets
    found = []
    for title, options in fieldsets:
        fields: list[Any] = []
        for each in options["fields"]:
            group = tuple(name for name in each if name not in hidden) if isinstance(each, (tuple, list)) else each
            if group and group not in hidden:
                fields.append(group)
        if fields:
            found.append((title, {**options, "fields": tuple(fields)}))
    return tuple(found)
