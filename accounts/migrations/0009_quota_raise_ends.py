from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("accounts", "0008_day_totals")]

    operations = [
        migrations.AddField(
            model_name="quotaraise",
            name="ends_at",
            field=models.DateTimeField(
                blank=True, help_text="Empty: for good. Else as a limit for a time.", null=True
            ),
        ),
    ]
