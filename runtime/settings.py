"""
Settings: one table per process, checked at startup; all problems are reported at once.

The table of a process is a subclass of the parts below. Names in upper case are environment
variables, also read from a file `.env` in the working directory. `NAME_FILE` names a file that
holds the value of `NAME`: this is how secrets are mounted into a container.
"""

import re
import ssl
import sys
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pymongo.errors import PyMongoError
from pymongo.uri_parser import parse_uri

from runtime.exit_codes import ExitCode

#: Options of a MongoDB URL, in lower case, that leave the server's certificate or name unchecked.
INSECURE_TLS = frozenset({"tlsinsecure", "tlsallowinvalidcertificates", "tlsallowinvalidhostnames"})

TLS_FILES = frozenset({"tlscafile", "tlscrlfile", "tlscertificatekeyfile"})
CERTIFICATES_WITH_KEY = frozenset({"tlscertificatekeyfile", "certfile"})

#: Processes of one kind on a host share a setting and take the next free of this many ports.
MONITORING_PORTS = 10


def _url(name: str, schemes: tuple[str, ...], parse: Callable[[str], None]) -> AfterValidator:
    """
    A URL that the driver can parse.

    parse: raises ValueError or PyMongoError; their text is not shown, as it may hold a part of the
    password.
    """

    def check(url: SecretStr) -> SecretStr:
        text = url.get_secret_value()
        if not text.startswith(schemes):
            raise ValueError(f"must start with {' or '.join(schemes)}")
        try:
            parse(text)
        except (ValueError, PyMongoError):
            raise ValueError(f"is not a valid {name} URL; escape @ : / % in the password") from None
        return url

    return AfterValidator(check)


def _parse_mongodb_url(url: str) -> None:
    scheme, _, rest = url.partition("://")
    address, _, database = rest.partition("?")[0].partition("/")
    _without_at_sign(database)
    if scheme == "mongodb+srv":
        # its hosts are in DNS, which must not be queried before the process runs
        url = f"mongodb://{address}/"
    elif "?" in url:
        # a file that is missing is reported by `_check_mongodb_options`
        url = f"{url.partition('?')[0]}?{_without_files(_mongodb_options(url))}"
    with warnings.catch_warnings():
        # the driver itself warns of options that it does not know
        warnings.simplefilter("ignore")
        parse_uri(url, warn=True)


def _mongodb_options(url: str) -> list[tuple[str, str]]:
    return parse_qsl(url.partition("?")[2].replace(";", "&"), keep_blank_values=True)


def _without_files(options: Sequence[tuple[str, str]]) -> str:
    return urlencode([option for option in options if option[0].lower() not in TLS_FILES])


def _check_mongodb_options(url: SecretStr, info: ValidationInfo) -> SecretStr:
    """Raises ValueError for an option that weakens what the product promises, or a bad file."""
    options = {
        name.lower(): (name, value) for name, value in _mongodb_options(url.get_secret_value())
    }
    if not info.data.get("mongodb_allow_insecure_tls"):
        for lowered in INSECURE_TLS & options.keys():
            name, value = options[lowered]
            if value.lower() == "true":
                raise ValueError(
                    f"{name} disables the check of MongoDB's certificate: remove it and name the "
                    "certificate authority in tlsCAFile, or set MONGODB_ALLOW_INSECURE_TLS=true"
                )
    name, value = options.get("readpreference", ("", "primary"))
    if value.lower() != "primary":
        raise ValueError(f"{name} must be primary: other members may return outdated data")
    name, value = options.get("journal", ("", "true"))
    if value.lower() != "true":
        raise ValueError(f"{name} must be true: otherwise a crash may lose an acknowledged write")
    passphrase = options.get("tlscertificatekeyfilepassword", ("", ""))[1]
    for lowered in TLS_FILES & options.keys():
        name, path = options[lowered]
        _check_tls_file(name, path, passphrase)
    return url


def _check_tls_file(name: str, path: str, passphrase: str = "") -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if name.lower() in CERTIFICATES_WITH_KEY:
            context.load_cert_chain(path, password=passphrase)
        else:
            context.load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError(f"{name}: {path} does not hold what it should in PEM format") from None
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read: {error.strerror or error}") from None


def _parse_amqp_url(url: str) -> None:
    parts = urlsplit(url)
    if not parts.hostname or parts.port == 0:
        raise ValueError("no host, or no port")
    _without_at_sign(parts.path + parts.query + parts.fragment)


#: Only before another URL: a comma may be part of a password.
BETWEEN_AMQP_URLS = re.compile(r"\s*,\s*(?=amqps?://)")


def split_amqp_urls(text: str) -> list[str]:
    """The URLs of one or several nodes, separated by commas."""
    return BETWEEN_AMQP_URLS.split(text.strip())


def _parse_amqp_urls(text: str) -> None:
    for url in split_amqp_urls(text):
        _parse_amqp_url(url)


def _one_virtual_host(urls: SecretStr) -> SecretStr:
    paths = {urlsplit(url).path.strip("/") for url in split_amqp_urls(urls.get_secret_value())}
    if len(paths) > 1:
        raise ValueError("its URLs must all name the same virtual host")
    return urls


def _without_at_sign(after_address: str) -> None:
    """An unescaped / or ? in a password like `12/34` ends the address early, with a valid port."""
    if "@" in after_address:
        raise ValueError("the address ends before the password does")


def _check_amqp_options(urls: SecretStr) -> SecretStr:
    """Raises ValueError for TLS options, a Python dictionary in the URL, that pika cannot use."""
    for url in split_amqp_urls(urls.get_secret_value()):
        if text := dict(parse_qsl(urlsplit(url).query)).get("ssl_options"):
            _check_amqp_tls(text)
    return urls


def _check_amqp_tls(text: str) -> None:
    try:
        options = dict(literal_eval(text))
    except (ValueError, TypeError, SyntaxError, RecursionError):
        raise ValueError("ssl_options is not a Python dictionary") from None
    if "protocol" in options:
        # some protocols of Python's `ssl` check no certificate
        raise ValueError("ssl_options must not choose a protocol: the certificate may go unchecked")
    for name in {"cafile", "ca_certs"} & options.keys():
        _check_tls_file(name, str(options[name]))
    if "certfile" in options and "keyfile" not in options:
        _check_tls_file("certfile", str(options["certfile"]), str(options.get("password", "")))


class SettingsTable(BaseSettings):
    """The base of every table; one with an `env_prefix` reads variables with that prefix."""

    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        env_ignore_empty=True,
        # fields that hold JSON parse it themselves, so that invalid JSON is reported with the rest
        enable_decoding=False,
        hide_input_in_errors=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        _ = file_secret_settings
        files = NamedFiles(settings_cls, _variables(env_settings, dotenv_settings))
        return init_settings, env_settings, dotenv_settings, files


class NamedFiles(PydanticBaseSettingsSource):
    """`NAME_FILE`: the value of `NAME` is what the file holds, without the white space around."""

    def __init__(self, table: type[BaseSettings], variables: Mapping[str, str]) -> None:
        super().__init__(table)
        self._variables = variables
        #: what is wrong with the files, one line a problem, without their content
        self.problems: list[str] = []
        self._values = dict(self._read())

    def __call__(self) -> dict[str, Any]:
        return self._values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        _ = field
        return self._values.get(field_name), field_name, False

    def _read(self) -> Iterator[tuple[str, str]]:
        for field in self.settings_cls.model_fields:
            name = variable_name(self.settings_cls, field)
            path = self._variables.get(f"{name}_FILE".lower())
            if path is None:
                continue
            if name.lower() in self._variables:
                self.problems.append(f"{name} and {name}_FILE are both set: remove one of them")
                continue
            try:
                value = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
                self.problems.append(f"{name}_FILE: {path} cannot be read: {reason}")
                continue
            if value:
                yield field, value
            else:
                self.problems.append(f"{name}_FILE: {path} is empty")


def _variables(*sources: PydanticBaseSettingsSource) -> dict[str, str]:
    """Every variable of the sources, by its name in lower case; the first source wins."""
    found: dict[str, str] = {}
    for source in reversed(sources):
        if isinstance(source, EnvSettingsSource):
            given = source.env_vars.items()
            found |= {name.lower(): value for name, value in given if value}
    return found


class ProcessSettings(SettingsTable):
    log_level: Annotated[str, AfterValidator(str.upper)] = Field(
        default="INFO",
        pattern="(?i)^(debug|info|warning|error)$",
        description="minimum level that is logged: debug, info, warning or error",
    )
    log_format: str = Field(
        default="auto",
        pattern="^(auto|json|pretty)$",
        description="`json`, `pretty`, or `auto`: pretty in a terminal, JSON elsewhere",
    )


class MongoSettings(ProcessSettings):
    # before the URL, whose check reads it
    mongodb_allow_insecure_tls: bool = Field(
        default=False,
        description="whether `MONGODB_URL` may disable the check of MongoDB's certificate or host "
        "name (`tlsInsecure`, `tlsAllowInvalidCertificates`, `tlsAllowInvalidHostnames`)",
    )
    mongodb_url: Annotated[
        SecretStr,
        _url("MongoDB", ("mongodb://", "mongodb+srv://"), _parse_mongodb_url),
        AfterValidator(_check_mongodb_options),
    ] = Field(
        description="URL of the replica set, with credentials: mongodb://user:password@host/?replicaSet=rs0"
    )
    mongodb_database: str = Field(
        default="assistance", min_length=1, description="name of the database that holds the outbox"
    )


class RabbitSettings(ProcessSettings):
    rabbitmq_url: Annotated[
        SecretStr,
        _url("AMQP", ("amqp://", "amqps://"), _parse_amqp_urls),
        AfterValidator(_one_virtual_host),
        AfterValidator(_check_amqp_options),
    ] = Field(
        description="URL of the broker, with credentials and virtual host: "
        "amqp://user:password@host:5672/. Separate the URLs of several nodes by commas: each "
        "connection tries their addresses in random order until one answers"
    )
    rabbitmq_heartbeat_seconds: int = Field(
        default=5,
        ge=1,
        le=600,
        description="AMQP heartbeat interval; a silent peer is dead after two or three of them",
    )
    events_exchange: str = Field(
        default="events",
        min_length=1,
        max_length=255,
        description="name of the topic exchange for events",
    )


def port_from(first: int) -> Any:
    return Field(
        default=first,
        ge=0,
        le=65535,
        description="TCP port of /metrics, /livez and /readyz; if taken, the next free one of "
        f"{MONITORING_PORTS}; 0 disables them",
    )


class MonitoringSettings(ProcessSettings):
    """Each kind of process has a default port of its own, so that all can share a host."""

    monitoring_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="address that serves /metrics, /livez and /readyz, without authentication",
    )
    monitoring_port: int = port_from(8010)


Settings = TypeVar("Settings", bound=SettingsTable)


def load_settings(table: type[Settings], process: str) -> Settings:
    """The settings of a process; ends the process with one line per problem."""
    settings = read_settings(table)
    if isinstance(settings, list):
        refuse_settings(process, settings)
    return settings


def read_settings(table: type[Settings]) -> Settings | list[str]:
    """The settings, or one line per problem; no line shows a value, which may be secret."""
    problems = _problems_with_files(table)
    try:
        settings = table()
    except ValidationError as error:
        named = {problem.split("_FILE")[0].split(" ")[0] for problem in problems}
        for detail in error.errors(include_input=False):
            missing = detail["type"] == "missing" and len(detail["loc"]) == 1
            # the line on its file says more
            if not (missing and variable_name(table, str(detail["loc"][0])) in named):
                problems.append(_problem(table, detail))
        return problems
    return problems or settings


def given_settings(table: type[SettingsTable]) -> list[str]:
    """The fields of the table for which a variable, or a file, is given."""
    variables = _variables(EnvSettingsSource(table), DotEnvSettingsSource(table))
    return [
        field
        for field in table.model_fields
        if {(name := variable_name(table, field).lower()), f"{name}_file"} & variables.keys()
    ]


def _problems_with_files(table: type[SettingsTable]) -> list[str]:
    variables = _variables(EnvSettingsSource(table), DotEnvSettingsSource(table))
    return NamedFiles(table, variables).problems


def refuse_settings(process: str, problems: Sequence[str]) -> NoReturn:
    count = "1 setting is" if len(problems) == 1 else f"{len(problems)} settings are"
    sys.stderr.write(f"{process} does not start: {count} wrong\n")
    sys.stderr.writelines(f"  {problem}\n" for problem in problems)
    raise SystemExit(ExitCode.CONFIGURATION)


def _problem(table: type[SettingsTable], detail: Any) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ").replace("\n", "\n    ")
    if not detail["loc"]:
        return message
    field, *inside = (str(part) for part in detail["loc"])
    name = ".".join([variable_name(table, field), *inside])
    if detail["type"] == "missing":
        known = table.model_fields.get(field)
        meaning = f" ({known.description})" if known and known.description else ""
        return f"{name} is missing{meaning}; give it or {name}_FILE"
    return f"{name}: {message}"


def variable_name(table: type[BaseSettings], field: str) -> str:
    prefix = table.model_config.get("env_prefix") or ""
    return f"{prefix}{field}".upper()
