"""Pages of Django's users and groups, in the clothes of the other pages, and of roles in the installation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as StockGroupAdmin
from django.contrib.auth.admin import UserAdmin as StockUserAdmin
from django.contrib.auth.models import Group, User
from unfold.admin import ModelAdmin
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm

from accounts.models import StaffRole

if TYPE_CHECKING:
    UserAdminBase = StockUserAdmin[User]
else:
    UserAdminBase = StockUserAdmin

admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class UserAdmin(UserAdminBase, ModelAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm


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
