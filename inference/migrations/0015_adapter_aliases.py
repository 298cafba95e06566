

import django.core.validators
import django.db.models.deletion
import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ("inference", "0014_receipt_by_key"),
    ]

    operations = [
        migrations.AddField(
            model_name='receipt',
            name='aliases',
            field=models.JSONField(blank=True, default=list, help_text='Pairs of an alias that was asked for and the adapter that answered.'),
        ),
        migrations.CreateModel(
            name='AdapterAlias',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('name', models.CharField(help_text='What tenants write, also as `model:name`.', max_length=64, validators=[django.core.validators.RegexValidator('^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\\Z', 'Use 1 to 64 letters, digits, dots, dashes and underscores.')])),
                ('share', models.PositiveSmallIntegerField(default=0, help_text='Percent of the conversations that the canary answers.', validators=[django.core.validators.MaxValueValidator(100)])),
                ('created_at', models.DateTimeField(default=django.utils.timezone.now, editable=False)),
                ('updated_at', models.DateTimeField(auto_now=True)),
                ('base_model', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='adapter_aliases', to='inference.servedmodel')),
                ('canary', models.ForeignKey(blank=True, help_text='The version on trial, for tenants that may use it.', null=True, on_delete=django.db.models.deletion.PROTECT, related_name='canary_of', to='inference.adapter')),
                ('previous', models.ForeignKey(blank=True, editable=False, help_text='What it led to before: a roll back returns there.', null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to='inference.adapter')),
                ('target', models.ForeignKey(help_text='The version that answers.', on_delete=django.db.models.deletion.PROTECT, related_name='aliases', to='inference.adapter')),
            ],
            options={
                'verbose_name': 'adapter alias',
                'verbose_name_plural': 'adapter aliases',
                'ordering': ['base_model', 'name'],
                'constraints': [models.UniqueConstraint(fields=('base_model', 'name'), name='adapter_alias_one_name_per_model'), models.CheckConstraint(condition=models.Q(('share__range', (0, 100))), name='adapter_alias_share_is_a_percentage'), models.CheckConstraint(condition=models.Q(('share', 0), ('canary__isnull', False), _connector='OR'), name='adapter_alias_share_has_a_canary'), models.CheckConstraint(condition=models.Q(('canary__isnull', True), models.Q(('canary', models.F('target')), _negated=True), _connector='OR'), name='adapter_alias_canary_is_another')],
            },
        ),
    ]
