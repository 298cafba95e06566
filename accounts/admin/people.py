"""Pages of Django's users and groups, in the clothes of the other pages, and of roles in the installation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as StockGroupAdmin
from django.contrib.auth.admin import UserAdmin as StockUserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.admin import ModelAdmin
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from accounts.models import StaffRole

if TYPE_CHECKING:
    UserAdminBase = StockUserAdmin[User]
else:
    UserAdminBase = StockUserAdmin

MOST_ROLES = 4
"""Of a person, that a row of the list names."""

admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class UserAdmin(UserAdminBase, ModelAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "email", "roles_held", "is_active", "last_login")

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        rows: QuerySet[User] = super().get_queryset(request)
        return rows.select_related("staff_role").prefetch_related("memberships__tenant")

    @admin.display(description="Roles")
    def roles_held(self, user: User) -> str:
        """What a person may do here; Django's flag of staff says little of it."""
        staff: StaffRole | None = getattr(user, "staff_role", None)
        held = ["Superuser"] if user.is_superuser else []
        held += [staff.get_role_display()] if staff else ["Staff"] if user.is_staff and not held else []
        held += [f"{each.get_role_display()} of {each.tenant}" for each in user.memberships.all()]
        more = [f"and {len(held) - MOST_ROLES} more"] if len(held) > MOST_ROLES else []
        return ", ".join([*held[:MOST_ROLES], *more]) or "-"


@admin.register(StaffRole)
class StaffRoleAdmin(ModelAdmin):
    """Operators and auditors; superusers alone give these roles."""

    list_display = ("user", "role", "created_at")
    list_select_related = ("user",)
    list_filter = ("role",)
    search_fields = ("user__username",)
    autocomplete_fields = ("user",)
    fields = ("user", "role")


@admin.register(Group)
class GroupAdmin(StockGroupAdmin, ModelAdmin):
    pass
