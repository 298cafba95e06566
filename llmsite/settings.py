"""Django's settings, derived from llmsite.config: no other file reads the environment."""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from llmsite.config import BASE_DIR, ConfigError, get_config
from llmsite.logs import logging_config

try:
    CONFIG = get_config()
except ConfigError as error:
    sys.exit("The environment does not describe a server that can start:\n  - " + "\n  - ".join(error.problems))

SECRET_KEY = CONFIG.secret("secret_key", CONFIG.secret_key)
SECRET_KEY_FALLBACKS = CONFIG.secret_key_fallbacks
KEY_PEPPER = CONFIG.secret("key_pepper", CONFIG.key_pepper, prefix="1:")
DEBUG = CONFIG.debug
ALLOWED_HOSTS = CONFIG.allowed_hosts
CSRF_TRUSTED_ORIGINS = CONFIG.csrf_trusted_origins

INSTALLED_APPS = [
    "unfold.apps.BasicAppConfig",
    "unfold.contrib.filters",
    "llmsite.console.site.ConsoleConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_prometheus",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "llmsite",
    "accounts",
    "inference",
]

# The console's door (see llmsite/asgi.py). Generation endpoints come in by a door without any of these.
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "llmsite.console.door.SecurityHeaders",
    "llmsite.console.door.NoNul",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "llmsite.console.door.ConsoleSessions",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "llmsite.urls"
ASGI_APPLICATION = "llmsite.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "libraries": {"words": "llmsite.console.words"},
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]


def _database(url: str) -> dict[str, Any]:
    if not url:
        return {
            "ENGINE": "django_prometheus.db.backends.sqlite3",
            "NAME": CONFIG.state / "db.sqlite3",
            "TEST": {"NAME": str(CONFIG.state / "test.sqlite3")},  # a file: threads of a test must see WAL, not memory
            "OPTIONS": {
                "transaction_mode": "IMMEDIATE",
                "timeout": 5,
                # secure_delete: what is deleted is overwritten in the file
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA secure_delete=ON;",
            },
        }
    parts = urlsplit(url)
    return {
        "ENGINE": "django_prometheus.db.backends.postgresql",
        "NAME": parts.path.lstrip("/"),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {
            "pool": {"min_size": 1, "max_size": CONFIG.web_threads + 8, "timeout": 3},
            "connect_timeout": 3,
            # of a machine that is gone Linux alone would wait a quarter of an hour for a word
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
            # a lock held by a process that hangs must not take the site with it
            "options": "-c lock_timeout=2s -c idle_in_transaction_session_timeout=10s",
            **dict(parse_qsl(parts.query)),
        },
    }


def _mail(url: str) -> dict[str, Any]:
    """Django's settings for mail; without a URL nothing is sent."""
    parts = urlsplit(url)
    is_tls = parts.scheme == "smtps"
    return {
        "EMAIL_BACKEND": f"django.core.mail.backends.{'smtp' if url else 'dummy'}.EmailBackend",
        "EMAIL_HOST": parts.hostname or "",
        "EMAIL_PORT": parts.port or (465 if is_tls else 587),
        "EMAIL_HOST_USER": unquote(parts.username or ""),
        "EMAIL_HOST_PASSWORD": unquote(parts.password or ""),
        "EMAIL_USE_SSL": is_tls,
        "EMAIL_USE_TLS": bool(url) and not is_tls,
        "EMAIL_TIMEOUT": 10,
        "DEFAULT_FROM_EMAIL": CONFIG.email_from,
    }


globals().update(_mail(CONFIG.email_url))

DATABASES = {"default": _database(CONFIG.database_url)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

CACHES = {
    "default": {
        "BACKEND": "llmsite.cache.SharedRedisCache",
        "LOCATION": CONFIG.redis(1),
        "KEY_PREFIX": "llmsite",
        "OPTIONS": {"socket_timeout": 2, "socket_connect_timeout": 0.5},
    }
}
REDIS_URL = CONFIG.redis(0)

CELERY_BROKER_URL = CONFIG.broker_url
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_IGNORE_RESULT = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_SEND_TASK_EVENTS = False
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_TIMEZONE = "UTC"
CELERY_TASK_PUBLISH_RETRY = False  # the web refuses with 503 rather than hold an admission thread
CELERY_BROKER_TRANSPORT_OPTIONS = CONFIG.broker_options

# Requests per minute: counted by django-ratelimit behind accounts/limits/throttling.py, which adds what it lacks.
RATELIMIT_USE_CACHE = "default"
SILENCED_SYSTEM_CHECKS = [
    "django_ratelimit.W001",  # core's RedisCache increments atomically; the check only knows django-redis
    "security.W005",  # HSTS for subdomains, and
    "security.W021",  # the browsers' preload list: for whoever owns the whole domain to decide, at the proxy
]

REST_FRAMEWORK = {
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_AUTHENTICATION_CLASSES": ["accounts.identity.authentication.APIKeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "EXCEPTION_HANDLER": "inference.api.errors.exception_handler",
    "UNAUTHENTICATED_USER": None,
}
SPECTACULAR_SETTINGS = {
    "ENUM_NAME_OVERRIDES": {
        "AnswerFormatEnum": ["text", "json_object", "json_schema"],
        "ImportKindEnum": "inference.imports.models.ModelImport.Kind",
    },
    "TITLE": "llmsite",
    "DESCRIPTION": "Serve GGUF models and LoRA adapters to many tenants.",
    "VERSION": "0.1.0",
    "OAS_VERSION": "3.1.0",  # pydantic's schemas are of that version
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.AllowAny"],
    "SERVE_AUTHENTICATION": [],
}

AUTHENTICATION_BACKENDS = ["accounts.identity.roles.RoleBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 12}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "/static/"
STATIC_ROOT = CONFIG.state / "static"
WHITENOISE_USE_FINDERS = True
WHITENOISE_ALLOW_ALL_ORIGINS = False  # the console's files are for its own pages

SECURE_SSL_REDIRECT = CONFIG.secure_cookies
SESSION_COOKIE_SECURE = CONFIG.secure_cookies
CSRF_COOKIE_SECURE = CONFIG.secure_cookies
# No SECURE_PROXY_SSL_HEADER: uvicorn sets the scheme from X-Forwarded-Proto, and only for TRUSTED_PROXIES.
SECURE_HSTS_SECONDS = CONFIG.hsts_seconds if CONFIG.secure_cookies else 0
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_AGE = 12 * 3600  # from the sign-in on; llmsite/console/door.py ends idle ones before
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = CONFIG.max_body_bytes

LOGGING_CONFIG = "logging.config.dictConfig"
LOGGING = logging_config(CONFIG.log_level, CONFIG.log_format)

FORMAT_MODULE_PATH = "llmsite.formats"
LOGIN_REDIRECT_URL = "admin:index"  # whoever opens the sign-in page itself; else the page that was asked for
UNFOLD = {
    "SITE_TITLE": "llmsite",
    "SITE_HEADER": "llmsite",
    "SITE_SUBHEADER": "Operator console",
    "SITE_SYMBOL": "token",
    "SITE_URL": "/docs/",
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": "llmsite.console.navigation.favicon"}],
    "LOGIN": {"form": "accounts.pages.login.ConsoleLoginForm"},
    "STYLES": ["llmsite.console.navigation.stylesheet"],
    "SCRIPTS": ["llmsite.console.navigation.script"],
    "SIDEBAR": {"navigation": "llmsite.console.navigation.sidebar"},
    "DASHBOARD_CALLBACK": "llmsite.console.dashboard.callback",
}
