from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('inference', '0005_chat_template'),
    ]

    operations = [
        migrations.AddField(
            model_name='servedmodel',
            name='context_shift',
            field=models.BooleanField(
                default=True,
                help_text='Requests that ask for more than the context holds go on without the oldest tokens of it.',
            ),
        ),
    ]
