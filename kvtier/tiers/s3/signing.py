"""Signing requests with botocore's SigV4, over its whole chain of credentials."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import boto3
import botocore.exceptions as boto_errors
from botocore.auth import S3ExpressAuth, S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config as BotoConfig

from kvtier.config import S3Config
from kvtier.errors import AccessDenied, ConfigError, TierUnavailable
from kvtier.tiers.s3.express import Sessions

# Blocks and footers carry checksums of their own; SHA-256 over a body would cost half a CPU second a GiB.
_UNSIGNED_BODY = BotoConfig(s3={"payload_signing_enabled": False})


def open_session(config: S3Config) -> boto3.session.Session:
    """Return a session with the configured keys, or with the usual chain.

    Raises:
        AccessDenied: A variable that should hold a key is not set.
    """
    try:
        keys = config.credentials()
    except ConfigError as error:
        raise AccessDenied(str(error)) from error
    return boto3.session.Session(
        aws_access_key_id=keys[0] if keys else None,
        aws_secret_access_key=keys[1] if keys else None,
        region_name=config.region,
    )


class Signer:
    """Signs requests. Thread-safe; credentials that expire are refreshed by botocore when they are due."""

    def __init__(self, config: S3Config, sessions: Sessions | None = None):
        """Prepare; the credentials are looked up when the first request is signed.

        Args:
            config: Says where the credentials are.
            sessions: Of a directory bucket; None for other buckets.
        """
        self._config = config
        self._sessions = sessions
        self._lock = threading.Lock()
        self._credentials: Any = None

    def sign(self, method: str, url: str, headers: Mapping[str, str], region: str) -> dict[str, str]:
        """Return `headers` with those of the signature.

        Args:
            method: HTTP method.
            url: The whole URL, percent-encoded.
            headers: What is to be signed; has "Host".
            region: Region of the bucket.

        Raises:
            AccessDenied: There are no credentials.
            TierUnavailable: They cannot be refreshed at present.
        """
        request = AWSRequest(method, url, dict(headers))
        request.context["client_config"] = _UNSIGNED_BODY
        try:
            self._auth(region).add_auth(request)
        except (boto_errors.NoCredentialsError, boto_errors.PartialCredentialsError) as error:
            raise AccessDenied(
                f"{error}; set access_key_env and secret_key_env, or the usual AWS credentials"
            ) from error
        except (boto_errors.CredentialRetrievalError, boto_errors.MetadataRetrievalError) as error:
            raise TierUnavailable(f"the credentials cannot be refreshed: {error}") from error
        except boto_errors.BotoCoreError as error:
            raise AccessDenied(str(error)) from error
        return dict(request.headers.items())

    def forget(self) -> None:
        """Look the credentials up anew for the next request: the server says that these have expired."""
        with self._lock:
            self._credentials = None
        if self._sessions is not None:
            self._sessions.forget()

    def _auth(self, region: str) -> Any:
        if self._sessions is None:
            return S3SigV4Auth(self._frozen(), "s3", region)
        # The cache is for botocore's own clients, which look sessions up in it.
        return S3ExpressAuth(self._sessions.credentials(), "s3express", region, identity_cache=None)  # type: ignore[arg-type]

    def _frozen(self) -> Any:
        with self._lock:
            if self._credentials is None:
                self._credentials = open_session(self._config).get_credentials()
            credentials = self._credentials
        return credentials and credentials.get_frozen_credentials()
