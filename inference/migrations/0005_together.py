from django.db import migrations


class Migration(migrations.Migration):

    dependencies = [
        ('inference', '0004_context_shift'),
        ('inference', '0004_drafts'),
    ]

    operations = []
