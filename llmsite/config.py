"""Everything the environment may set, as one typed object, read once per process.

No Django here: the supervisor, `doctor` and the tests read it before Django is set up. A wrong value raises ConfigError
with every problem and how to mend each. The settings table of the README is generated from the fields.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import secrets
import tempfile
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

BASE_DIR = Path(__file__).resolve().parent.parent
MAX_SOCKET_PATH_BYTES = 107 if os.uname().sysname == "Linux" else 103  # sizeof(sockaddr_un.sun_path) - 1
SHORTEST_SECRET = 32
HOST = re.compile(r"((\*\.)?[A-Za-z0-9._-]{1,253}|\[[0-9a-fA-F:.]{2,45}\])(:[0-9]{1,5})?")
BEARER_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{1,4096}=*", re.ASCII)
"""RFC 6750, 2.1, of bounded length."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class ConfigError(Exception):
    """The environment does not describe a server that can start. `problems` holds one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Config(BaseSettings):
    """The environment of one llmsite installation. Field descriptions are the README's settings table."""

    model_config = SettingsConfigDict(env_file=None, case_sensitive=False, extra="ignore")

    host: str = Field("127.0.0.1", description="Address that the web process listens on.")
    port: int = Field(8000, ge=1, le=65535, description="Port of the web process.")
    state_dir: Path = Field(
        Path(".state"), description="Folder of everything the server keeps: database, Valkey, models, secrets."
    )
    database_url: str = Field(
        "", description="`postgres://user:password@host:5432/name`; empty uses SQLite in the state folder."
    )
    redis_url: str = Field("", description="`redis://host:6379/0` or `unix:///path`; empty starts an embedded Valkey.")
    valkey_max_memory_mb: int = Field(
        256, ge=16, le=1 << 20, description="Memory bound of the embedded Valkey; when it is full, new work gets a 503."
    )
    secret_key: str = Field("", description="Django's secret key; empty makes one in the state folder (loopback only).")
    secret_key_fallbacks: Annotated[list[str], NoDecode] = Field(
        [],
        description="Earlier values of `SECRET_KEY`, separated by commas: what they signed and sealed stays valid, new "
        "is made with `SECRET_KEY` alone.",
    )
    key_pepper: str = Field(
        "",
        description="Pepper of the API key hashes, `id:secret`, several separated by commas, the first is used for new "
        "keys; empty makes one in the state folder (loopback only).",
    )
    debug: bool = Field(False, description="Django's debug pages; refused beyond loopback.")
    allowed_hosts: Annotated[list[str], NoDecode] = Field(
        ["localhost", "127.0.0.1", "[::1]"], description="Host names that the server answers to, separated by commas."
    )
    csrf_trusted_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Origins such as `https://llm.example.org` that may post to the console behind a proxy."
    )
    secure_cookies: bool = Field(
        False, description="Set when browsers reach the console by HTTPS: secure cookies, redirect to HTTPS."
    )
    hsts_seconds: int = Field(
        0, ge=0, le=2 * 31536000, description="Strict-Transport-Security for this long; only with SECURE_COOKIES."
    )
    trusted_proxies: Annotated[list[str], NoDecode] = Field(
        [], description="Addresses or networks of the proxies whose `X-Forwarded-*` headers are believed; empty: none."
    )
    max_connections: int = Field(
        2048, ge=16, le=1 << 16, description="Connections of the web process at once; above it the answer is 503."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe log line that is written."
    )
    log_format: Literal["json", "console"] = Field("json", description="One JSON object a line, or lines for people.")

    web_threads: int = Field(
        8,
        ge=1,
        le=64,
        description="Threads of the web process that run admission; also its number of database connections.",
    )
    max_body_bytes: int = Field(
        2 * 1024 * 1024, ge=1024, le=1 << 30, description="Largest request body; above it the answer is 413."
    )
    body_timeout_seconds: float = Field(
        10.0,
        gt=0,
        le=600,
        description="Time a client has to send its headers, and again its body; then 408. And to read on; "
        "then it is cut.",
    )
    tokenizer_processes: int = Field(
        2,
        ge=1,
        le=16,
        description="Tokenizer children of the web process, per model, at most; they end a quarter of an hour after "
        "the model was asked last.",
    )
    tokenizer_timeout_seconds: float = Field(
        3.0,
        gt=0,
        le=60,
        description="Time one text may take to tokenize before its child is killed and the answer is 400.",
    )
    queue_timeout_seconds: float = Field(
        120.0, gt=0, le=86400, description="Time a request may wait for a slot before it ends with an error."
    )
    queue_order: Literal["fair", "fifo"] = Field(
        "fair",
        description="`fair`: tenants get slots by what they have had and the weight of their plan; `fifo`: first come, "
        "first served.",
    )
    generation_timeout_seconds: float = Field(
        600.0, gt=0, le=86400, description="Time a request may take in all, waiting included."
    )
    drain_seconds: float = Field(
        10.0, ge=0, le=3600, description="Time that running requests get to end when the worker is told to stop."
    )
    completion_cache_ttl_seconds: int = Field(
        3600,
        ge=0,
        le=30 * 86400,
        description="How long a completion is kept for identical requests; 0 switches the cache off.",
    )
    stream_kept_seconds: int = Field(
        600,
        ge=60,
        le=86400,
        description="How long the events of a request that has ended can be read again, its prompt with them.",
    )
    background_kept_seconds: int = Field(
        3600, ge=60, le=7 * 86400, description="The same for background requests, whose answer is fetched later."
    )
    idempotency_hours: int = Field(24, ge=24, le=720, description="How long an `Idempotency-Key` is remembered.")
    idempotent_answers_mb: int = Field(
        16,
        ge=1,
        le=4096,
        description="Memory in Redis for the answers to a tenant's idempotency keys, compressed; beyond it the oldest "
        "answer goes, its key is still refused.",
    )
    slot_memory_mb: int = Field(
        256,
        ge=0,
        le=1 << 20,
        description="Memory of a loaded model for the states of slots that others took; 0: they are computed again.",
    )
    slot_disk_mb: int = Field(
        512,
        ge=0,
        le=1 << 20,
        description="Disk space of a tenant for states of slots, those that it saves and those that outlive an unload; "
        "0: none are written.",
    )
    slot_days: int = Field(7, ge=1, le=365, description="How long a state of a slot stays on disk.")
    responses_mb: int = Field(
        64, ge=1, le=1 << 20, description="Space of a tenant for stored responses, compressed; the oldest make room."
    )
    batch_file_mb: int = Field(
        100,
        ge=1,
        le=1 << 14,
        description="Largest file that may be uploaded for a batch; above it the answer is 413.",
    )
    batch_lines: int = Field(50_000, ge=1, le=1_000_000, description="Lines of a batch at most.")
    batch_lines_at_once: int = Field(
        32,
        ge=1,
        le=1024,
        description="Lines of all batches together that are queued or running at once; the others wait in their files.",
    )
    batch_slots_percent: int = Field(
        50,
        ge=0,
        le=100,
        description="Share of a model's slots that lines of batches may take while no other request waits; one slot at "
        "least.",
    )
    open_batches: int = Field(20, ge=1, le=10_000, description="Batches of a tenant that have not ended, at most.")
    tenant_files: int = Field(
        200, ge=1, le=100_000, description="Files of a tenant at most, results of batches included."
    )
    tenant_files_mb: int = Field(1024, ge=1, le=1 << 24, description="Disk space of a tenant for those files.")
    file_days: int = Field(30, ge=1, le=3650, description="How long files and ended batches are kept.")
    import_mb: int = Field(
        64 * 1024,
        ge=1,
        le=1 << 24,
        description="Largest model or adapter that may be uploaded or fetched, all of its parts together.",
    )
    quarantine_mb: int = Field(
        128 * 1024,
        ge=1,
        le=1 << 24,
        description="Disk space for uploaded and fetched files that have not passed their checks.",
    )
    import_hours: int = Field(
        24, ge=1, le=720, description="Time after which an upload or a download that nobody goes on with is removed."
    )
    fetch_hosts: Annotated[list[str], NoDecode] = Field(
        ["huggingface.co", "*.hf.co"],
        description="Hosts that models may be fetched from, redirects included: `host`, `host:port`, or `*.host` for "
        "what is below it; without a port, 80 and 443. Empty: none are fetched.",
    )
    fetch_private_networks: Annotated[list[str], NoDecode] = Field(
        [],
        description="Networks such as `10.0.0.0/8` that those hosts may be in, beside the public ones; empty: none.",
    )
    fetch_tokens: Annotated[list[str], NoDecode] = Field(
        [],
        repr=False,
        description="Bearer tokens for such hosts, separated by commas: `host=token`, or `host=@/path/of/a/file` that "
        "holds it; `host:port` where it is not 443. Sent by https to that very host alone.",
    )
    model_hub_url: str = Field(
        "https://huggingface.co",
        description="Where `owner/repository:file.gguf` is looked for: Hugging Face or a mirror.",
    )
    model_memory_mb: int = Field(
        0,
        ge=0,
        le=1 << 24,
        description="Memory of a worker for its models, by their estimates: when it is full, the one that was idle for "
        "longest is unloaded for the next; 0: nine tenths of the machine's, or of what its container may have.",
    )
    model_idle_timeout_seconds: int = Field(
        300,
        ge=0,
        le=365 * 86400,
        description="Idle time after which a model that is loaded on request is unloaded, where it has no "
        "`keep_alive_seconds` of its own; 0: never. Models that are loaded at start stay.",
    )
    default_max_tokens: int = Field(
        512, ge=1, le=1 << 20, description="Output bound of a native request that names none."
    )
    default_temperature: float = Field(
        0.7, ge=0, le=5, description="Temperature of a native or OpenAI request that names none."
    )
    redis_outage_policy: Literal["closed", "open"] = Field(
        "closed",
        description="Requests per minute while Redis does not answer: `closed` refuses with 503, `open` lets a bounded "
        "number a minute through.",
    )
    currency: str = Field(
        "USD", pattern=r"^[A-Z]{3}$", description="Of the prices and of the costs that follow from them, ISO 4217."
    )
    ledger_days: int = Field(
        400,
        ge=0,
        le=36500,
        description="How long entries of ended quota periods are kept, once their statements are; 0: for ever.",
    )
    receipt_days: int = Field(400, ge=0, le=36500, description="How long receipts are kept; 0: for ever.")
    refusal_days: int = Field(
        14, ge=0, le=36500, description="How long it is kept why requests were refused; 0: for ever."
    )
    audit_days: int = Field(400, ge=0, le=36500, description="How long it is kept who changed what; 0: for ever.")
    console_idle_minutes: int = Field(
        60, ge=1, le=720, description="Idle time after which the console asks for the password again; 12 hours in all."
    )
    quota_approval_tokens: int = Field(
        0,
        ge=0,
        le=10**15,
        description="Tokens a month above which raising a tenant's quota needs a second operator; 0: never.",
    )
    email_url: str = Field(
        "",
        description="`smtp://user:password@host:587` (STARTTLS) or `smtps://user:password@host:465` for quota alerts "
        "to the owners of tenants; empty: none are mailed.",
    )
    email_from: str = Field("llmsite@localhost", max_length=254, description="Sender of these mails.")
    worker_metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port on HOST where a worker shows its own `/metrics`; 0: none. On one machine the web shows all.",
    )
    models_yaml: Path | None = Field(
        None, description="Registry file for `manage.py sync_models`; read at start when it is set."
    )
    require_model_ready: bool = Field(
        True,
        description="`/readyz` answers 503 until a worker holds the default model, or would load it for its next "
        "request.",
    )
    metrics_allowed_networks: Annotated[list[str], NoDecode] = Field(
        ["127.0.0.0/8", "::1/128"], description="Networks that may read `/metrics` without an operator key."
    )
    engine: Literal["llama", "fake"] = Field(
        "llama",
        description="`fake` answers at once with made-up text: for benchmarks of the path around the model, never for "
        "tenants.",
    )

    @field_validator(
        "allowed_hosts",
        "csrf_trusted_origins",
        "fetch_hosts",
        "fetch_private_networks",
        "fetch_tokens",
        "metrics_allowed_networks",
        "secret_key_fallbacks",
        "trusted_proxies",
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("fetch_private_networks", "metrics_allowed_networks", "trusted_proxies")
    @classmethod
    def _are_networks(cls, value: list[str]) -> list[str]:
        for part in value:
            ipaddress.ip_network(part)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_not_everybody(cls, value: list[str]) -> list[str]:
        if any(ipaddress.ip_network(part).prefixlen == 0 for part in value):
            raise ValueError("this trusts every address, so anybody could say where he comes from: name the proxies")
        return value

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in {"postgres", "postgresql"}:
            raise ValueError("use postgres://user:password@host:5432/name, or leave it empty for SQLite")
        return value

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in {"redis", "rediss", "unix"}:
            raise ValueError(
                "use redis://host:6379/0, rediss://... or unix:///path, or leave it empty for the embedded Valkey"
            )
        return value

    @field_validator("fetch_hosts")
    @classmethod
    def _are_hosts(cls, value: list[str]) -> list[str]:
        for part in value:
            if not HOST.fullmatch(part):
                raise ValueError(f"{part[:100]!r} is no host: use models.example.org, *.example.org or 10.0.0.7:8080")
        return [part.lower() for part in value]

    @field_validator("fetch_tokens")
    @classmethod
    def _are_tokens(cls, value: list[str]) -> list[str]:
        """Messages count entries and repeat none: host and token may have changed places."""
        hosts = set()
        for number, part in enumerate(value, 1):
            host, _, token = part.partition("=")
            if not HOST.fullmatch(host) or host.startswith("*") or not token:
                raise ValueError(f"entry {number} is not host=token or host=@/path/of/a/file with one whole host")
            if not (token.startswith("@/") or BEARER_TOKEN.fullmatch(token)):
                raise ValueError(f"entry {number} has neither a bearer token nor @ and a whole path behind its host")
            if host.lower() in hosts:
                raise ValueError(f"entry {number} is of a host that has a token already")
            hosts.add(host.lower())
        return value

    @field_validator("model_hub_url")
    @classmethod
    def _is_web(cls, value: str) -> str:
        if urlsplit(value).scheme not in {"http", "https"} or not urlsplit(value).hostname:
            raise ValueError("use https://huggingface.co or the address of a mirror")
        return value.rstrip("/")

    @field_validator("email_url")
    @classmethod
    def _is_smtp(cls, value: str) -> str:
        if value and (urlsplit(value).scheme not in {"smtp", "smtps"} or not urlsplit(value).hostname):
            raise ValueError("use smtp://user:password@host:587 or smtps://user:password@host:465, or leave it empty")
        return value

    @field_validator("key_pepper")
    @classmethod
    def _is_pepper_list(cls, value: str) -> str:
        for part in filter(None, value.split(",")):
            pepper_id, _, secret = part.partition(":")
            if not pepper_id.isalnum() or len(pepper_id) > 8 or len(secret) < 32:
                raise ValueError(
                    "use `id:secret` with an id of up to 8 letters or digits and a secret of 32 characters or more"
                )
        return value

    @model_validator(mode="after")
    def _has_tokens_for_allowed_hosts_alone(self) -> Config:
        for number, part in enumerate(self.fetch_tokens, 1):
            host = part.partition("=")[0].lower()
            above = [each[1:] for each in self.fetch_hosts if each.startswith("*.")]
            if host not in self.fetch_hosts and not host.endswith(tuple(above)):
                raise ValueError(
                    f"FETCH_TOKENS: FETCH_HOSTS does not name the host of entry {number}, so name it there"
                )
        return self

    @model_validator(mode="after")
    def _is_safe_beyond_loopback(self) -> Config:
        """The environment of a laptop must not be served to the world."""
        problems = []
        if exposed := self._why_exposed():
            if self.debug:
                problems.append(f"DEBUG is on while {exposed}: set DEBUG=false")
            if "*" in self.allowed_hosts:
                problems.append(f"ALLOWED_HOSTS is * while {exposed}: name the hosts")
            if self.secret_key and _is_guessable(self.secret_key):
                problems.append(f"SECRET_KEY is guessable while {exposed}: set it to 50 random characters")
            if any(map(_is_guessable, self.secret_key_fallbacks)):
                problems.append(f"SECRET_KEY_FALLBACKS has a guessable key while {exposed}: leave it out")
        if reason := self._why_secrets_must_be_given():
            if not self.secret_key:
                problems.append(f"SECRET_KEY is empty while {reason}: set it to 50 random characters")
            if not self.key_pepper:
                problems.append(f"KEY_PEPPER is empty while {reason}: set it to `1:` and 50 random characters")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _why_exposed(self) -> str:
        """Others than this machine's users reach the site, perhaps by a proxy on it; empty where they do not."""
        if not self.is_loopback:
            return "HOST is not loopback"
        if self.trusted_proxies:
            return "TRUSTED_PROXIES names a proxy"
        return "SECURE_COOKIES is set" if self.secure_cookies else ""

    def _why_secrets_must_be_given(self) -> str:
        """Secrets made in the state folder are right for one machine only; empty where they are."""
        if not self.is_loopback:
            return "HOST is not loopback"
        for name, url in (("DATABASE_URL", self.database_url), ("REDIS_URL", self.redis_url)):
            host = urlsplit(url).hostname
            if host and host not in LOOPBACK_NAMES:
                return f"{name} names another machine"
        return ""

    # What follows from the fields. Paths are absolute.

    @cached_property
    def state(self) -> Path:
        return self.state_dir.expanduser().resolve()

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK_NAMES

    @property
    def base_url(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def embedded_valkey_socket(self) -> Path:
        """In the state folder; where that is too deep for a Unix socket, in a private folder named after it.

        Every process with the same STATE_DIR comes to the same path. processes/valkey.py makes the folder, mode 0700.
        """
        path = self.state / "valkey" / "valkey.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
            return path
        name = hashlib.sha256(os.fsencode(self.state)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"llmsite-{os.getuid()}-{name}" / "valkey.sock"

    def redis(self, database: int = 0) -> str:
        """URL for redis-py and Django's cache. REDIS_URL names its own database; `database` is for the embedded one."""
        return self.redis_url or f"unix://{self.embedded_valkey_socket}?db={database}"

    @property
    def broker_url(self) -> str:
        """URL for Celery, which spells Unix sockets differently."""
        url = self.redis_url or f"unix://{self.embedded_valkey_socket}"
        if url.startswith("unix://"):
            path = urlsplit(url).path
            return f"redis+socket://{path}?virtual_host=0"
        return url

    @property
    def broker_options(self) -> dict[str, Any]:
        """Celery's options of the Redis transport, the same for web, worker and beat."""
        is_socket = self.broker_url.startswith("redis+socket")
        return {
            # A doorbell says only that something waits, and the sweep rings again for those that are lost: keeping
            # unacknowledged messages in Redis cost two round trips and 0.7 ms of the worker's time a request.
            "ack_emulation": False,
            "visibility_timeout": 900,
            "health_check_interval": 10,
            "socket_timeout": 30,
            "socket_connect_timeout": 2,
            "global_keyprefix": "llmsite:",
            **({} if is_socket else {"socket_keepalive": True}),
        }

    def secret(self, name: str, value: str, *, prefix: str = "") -> str:
        """The configured secret, else one kept in the state folder with mode 0600, made on first use."""
        if value:
            return value
        path = self.state / name
        if not path.exists():
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            scratch = path.with_name(f"{name}.{secrets.token_hex(4)}")
            scratch.touch(mode=0o600)
            scratch.write_text(prefix + secrets.token_urlsafe(48))
            with contextlib.suppress(FileExistsError):  # another process was first: then its secret counts
                path.hardlink_to(scratch)
            scratch.unlink()
        return path.read_text().strip()


def _is_guessable(secret: str) -> bool:
    """Short, or one that Django's own templates of projects come with."""
    return len(secret) < SHORTEST_SECRET or secret.startswith("django-insecure-")


def load() -> Config:
    """Read the environment. Raises ConfigError with all problems at once."""
    try:
        return Config()
    except ValidationError as error:
        problems = _sentences(error)
        wrong = [str(detail["loc"][0]) for detail in error.errors() if detail["loc"]]
    # Rules between settings are not looked at while one of them is wrong: look again with those at their defaults.
    try:
        if wrong:
            Config(**{name: Config.model_fields[name].default for name in wrong})
    except ValidationError as error:
        problems += [sentence for sentence in _sentences(error) if sentence not in problems]
    raise ConfigError(problems)


def _sentences(error: ValidationError) -> list[str]:
    sentences: list[str] = []
    for detail in error.errors():
        message = str(detail["msg"]).removeprefix("Value error, ")
        if not detail["loc"]:
            sentences += message.split("; ")  # rules between settings name them themselves
            continue
        name = str(detail["loc"][0]).upper()
        # A wrong secret is still a secret.
        is_secret = any(word in name for word in ("SECRET", "PEPPER", "URL", "FETCH_TOKENS"))
        given = "" if is_secret or detail["type"] == "missing" else f" (got {str(detail['input'])[:100]!r})"
        sentences.append(f"{name}: {message}{given}")
    return sentences


@lru_cache(maxsize=1)
def get_config() -> Config:
    """The configuration of this process."""
    return load()
