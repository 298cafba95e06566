
import django.db.models.deletion
import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ("inference", "0015_adapter_aliases"),
    ]

    operations = [
        migrations.CreateModel(
            name='ModelImport',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('kind', models.CharField(choices=[('model', 'Model'), ('adapter', 'Adapter')], default='model', max_length=8)),
                ('name', models.CharField(help_text='What requests will call it.', max_length=100)),
                ('url', models.CharField(blank=True, help_text='Empty: it is uploaded.', max_length=2000)),
                ('sha256', models.CharField(blank=True, help_text='What its SHA-256 must be.', max_length=64)),
                ('visibility', models.CharField(blank=True, max_length=8)),
                ('replaces', models.BooleanField(default=False, help_text='Whether it may take the place of one with its name.')),
                ('is_default', models.BooleanField(default=False)),
                ('state', models.CharField(choices=[('receiving', 'Receiving'), ('queued', 'Waiting for its checks'), ('reading', 'Reading its header'), ('hashing', 'Hashing'), ('loading', 'Loading on trial'), ('ready', 'Ready'), ('refused', 'Refused'), ('cancelled', 'Cancelled')], default='receiving', max_length=9)),
                ('problem_code', models.CharField(blank=True, max_length=64)),
                ('problem', models.TextField(blank=True, help_text='Why it was refused.')),
                ('files', models.JSONField(default=list)),
                ('total_bytes', models.BigIntegerField(help_text='None until it is known.', null=True)),
                ('received_bytes', models.BigIntegerField(default=0)),
                ('checked_bytes', models.BigIntegerField(default=0, help_text='Of them hashed.')),
                ('bytes_per_second', models.FloatField(default=0.0, help_text='Of what comes, over the last seconds.')),
                ('digest', models.CharField(blank=True, help_text='SHA-256, once it is ready.', max_length=64)),
                ('asked_by_kind', models.CharField(max_length=16)),
                ('asked_by', models.CharField(max_length=150)),
                ('is_attended', models.BooleanField(default=False, help_text='A command sees to it, and the web does not.')),
                ('num_checks', models.PositiveSmallIntegerField(default=0, help_text='How often its checks were begun.')),
                ('created_at', models.DateTimeField(default=django.utils.timezone.now)),
                ('updated_at', models.DateTimeField(default=django.utils.timezone.now, help_text='When somebody last did something for it.')),
                ('base_model', models.ForeignKey(blank=True, null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to='inference.servedmodel')),
            ],
            options={
                'verbose_name': 'import',
                'ordering': ['-id'],
                'indexes': [models.Index(condition=models.Q(('state__in', ['receiving', 'queued', 'reading', 'hashing', 'loading'])), fields=['id'], name='model_import_open')],
            },
        ),
    ]
