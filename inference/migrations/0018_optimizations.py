import django.core.validators
import django.db.models.deletion
import django.utils.timezone
import inference.tuning.models
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('inference', '0017_batch_idempotency'),
    ]

    operations = [
        migrations.CreateModel(
            name='Optimization',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('name', models.CharField(editable=False, help_text="The model's, when it was asked for.", max_length=100)),
                ('formats', models.CharField(blank=True, max_length=200, validators=[inference.tuning.models.check_formats])),
                ('max_perplexity_increase', models.FloatField(default=3.0, validators=[django.core.validators.MinValueValidator(0), django.core.validators.MaxValueValidator(1000)])),
                ('min_gain', models.FloatField(default=3.0, validators=[django.core.validators.MinValueValidator(-90), django.core.validators.MaxValueValidator(1000)])),
                ('max_minutes', models.FloatField(default=20.0, validators=[django.core.validators.MinValueValidator(0.1), django.core.validators.MaxValueValidator(600)])),
                ('rounds', models.PositiveSmallIntegerField(default=3, validators=[django.core.validators.MinValueValidator(1), django.core.validators.MaxValueValidator(9)])),
                ('seconds', models.FloatField(default=1.0, validators=[django.core.validators.MinValueValidator(0.1), django.core.validators.MaxValueValidator(30)])),
                ('tunes_settings', models.BooleanField(default=True)),
                ('folder', models.CharField(help_text='Where the file is written.', max_length=1000)),
                ('state', models.CharField(choices=[('running', 'Running'), ('done', 'Measured'), ('failed', 'Failed'), ('cancelled', 'Cancelled')], default='running', max_length=9)),
                ('step', models.CharField(blank=True, help_text='What is done now.', max_length=200)),
                ('part', models.FloatField(default=0.0, help_text='Of that step, 0 to 1.')),
                ('steps_done', models.PositiveIntegerField(default=0)),
                ('steps_total', models.PositiveIntegerField(default=0, help_text='As far as is known.')),
                ('problem_code', models.CharField(blank=True, max_length=64)),
                ('problem', models.TextField(blank=True, help_text='Why it failed.')),
                ('result', models.JSONField(help_text="What was measured, as the command's --json has it.", null=True)),
                ('asked_by_kind', models.CharField(max_length=16)),
                ('asked_by', models.CharField(max_length=150)),
                ('is_attended', models.BooleanField(default=False, help_text='A command sees to it, and the web does not.')),
                ('host', models.CharField(blank=True, help_text='The machine that measures.', max_length=255)),
                ('created_at', models.DateTimeField(default=django.utils.timezone.now)),
                ('started_at', models.DateTimeField(null=True)),
                ('updated_at', models.DateTimeField(default=django.utils.timezone.now, help_text='When somebody last worked on it.')),
                ('base_model', models.ForeignKey(null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to='inference.servedmodel')),
            ],
            options={
                'ordering': ['-id'],
                'constraints': [models.UniqueConstraint(condition=models.Q(('state', 'running')), fields=('state',), name='optimization_one_runs')],
            },
        ),
    ]
