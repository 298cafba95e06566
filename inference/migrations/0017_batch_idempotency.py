from django.db import migrations, models
from django.db.models import Q


class Migration(migrations.Migration):
    dependencies = [("inference", "0016_model_imports")]

    operations = [
        migrations.AddField(
            model_name="batch",
            name="idempotency_record",
            field=models.CharField(blank=True, default="", editable=False, max_length=80),
            preserve_default=False,
        ),
        migrations.AddField(
            model_name="batch",
            name="idempotency_print",
            field=models.CharField(blank=True, default="", editable=False, max_length=64),
            preserve_default=False,
        ),
        migrations.AddConstraint(
            model_name="batch",
            constraint=models.UniqueConstraint(
                fields=["tenant", "idempotency_record"],
                condition=~Q(idempotency_record=""),
                name="batch_once_per_idempotency_key",
            ),
        ),
    ]
