"""A job's object in the API server: the last spec received, the last status written."""

from __future__ import annotations

import math
from typing import Any, cast

from pretrain_api.messages.profile_request import ANNOTATION, InvalidRequest, ProfileRequest, read_request
from pretrain_api.spec.job import API_VERSION, KIND, PretrainJob
from pretrain_api.status.job import JobStatus
from pretrain_operator.kubernetes.client.api import JOBS, Api, ApiError, Object
from pretrain_operator.kubernetes.client.refusals import Gone
from pretrain_operator.kubernetes.workload.settings import PodSettings
from pretrain_operator.kubernetes.workload.validation import InvalidSpec, parse_job, parse_status


class JobRecord:
    """The single writer of a job's status: the status is what it wrote last, never read back from the object.

    Raises InvalidSpec if made from an object with an invalid spec."""

    def __init__(self, api: Api, body: Object, settings: PodSettings) -> None:
        metadata = body["metadata"]
        self._api = api
        self._settings = settings
        self._namespace: str = metadata["namespace"]
        self._name: str = metadata["name"]
        self.uid: str = metadata["uid"]
        self._version: str = metadata["resourceVersion"]
        self._generation: int = metadata["generation"]
        self.job: PretrainJob = parse_job(body, settings)
        """The last valid job."""
        self.invalid = ""
        """Errors of the latest spec; empty: it is valid."""
        self.stopping = "deletionTimestamp" in metadata
        self.profile = _profile_request(metadata)
        """Profile requested by annotation."""
        self.status: JobStatus = parse_status(body)

    def learn(self, body: Object) -> bool:
        """Take in a version of the object; return whether it matters. Older versions are ignored."""
        metadata = body["metadata"]
        if metadata["uid"] != self.uid or not _is_newer(metadata["resourceVersion"], self._version):
            return False
        self._version = metadata["resourceVersion"]
        before = self._generation, self.stopping, self.profile
        self.stopping = "deletionTimestamp" in metadata
        self.profile = _profile_request(metadata)
        if metadata["generation"] != self._generation:
            self._generation = metadata["generation"]
            try:
                self.job, self.invalid = parse_job(body, self._settings), ""
            except InvalidSpec as error:
                self.invalid = str(error)
        return before != (self._generation, self.stopping, self.profile)

    async def write_status(self, status: JobStatus) -> bool:
        """Replace the status, also if others wrote to the object meanwhile; return whether the answers brought news.
        Raises Gone if the job was deleted, ApiError if the write must be retried."""
        try:
            learnt = self.learn(await self._put(status))
        except ApiError as error:
            if error.status == 404:
                raise self._gone() from error
            if error.status != 409:
                raise
            newest = await self._newest()
            learnt = self.learn(newest)
            self._version = newest["metadata"]["resourceVersion"]
            learnt = self.learn(await self._put(status)) or learnt
        self.status = status
        return learnt

    async def delete(self) -> None:
        """Delete the job and, by garbage collection, its children. Succeeds if it is gone."""
        await self._api.delete(JOBS, self._namespace, self._name, uid=self.uid)

    async def _put(self, status: JobStatus) -> Object:
        """Write the status subresource. The resource version guards against another job of the same name."""
        shown = for_columns(status).model_dump(mode="python", by_alias=True, exclude_none=True)
        written = cast(Object, without_nan(shown))
        body: Object = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": self._name, "namespace": self._namespace, "resourceVersion": self._version},
            "status": written,
        }
        return await self._api.replace(JOBS, self._namespace, self._name, body, subresource="status")

    async def _newest(self) -> Object:
        try:
            body = await self._api.get(JOBS, self._namespace, self._name)
        except ApiError as error:
            if error.status == 404:
                raise self._gone() from error
            raise
        if body["metadata"]["uid"] != self.uid:
            raise self._gone()
        return body

    def _gone(self) -> Gone:
        return Gone(f"PretrainJob {self._namespace}/{self._name} no longer exists")


def for_columns(status: JobStatus) -> JobStatus:
    """Round the numbers that `kubectl get` prints verbatim."""
    goodput = status.goodput
    return status.model_copy(
        update={
            "loss": None if status.loss is None else round(status.loss, 6),
            "tokens_per_second": None if status.tokens_per_second is None else round(status.tokens_per_second, 1),
            "mfu": None if status.mfu is None else round(status.mfu, 4),
            "goodput": goodput and goodput.model_copy(update={"ratio": round(goodput.ratio, 4)}),
        }
    )


def without_nan(value: Any) -> Any:
    """Convert to JSON that the API server accepts: without NaN, infinities and numeric keys."""
    if isinstance(value, dict):
        members = cast(dict[object, Any], value)
        return {str(key): without_nan(item) for key, item in members.items() if not _is_nan(item)}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in cast(list[Any], value) if not _is_nan(item)]
    return value


def _profile_request(metadata: Object) -> ProfileRequest | InvalidRequest | None:
    annotations = cast(dict[str, str], metadata.get("annotations") or {})
    return read_request(annotations.get(ANNOTATION, ""))


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_newer(version: str, than: str) -> bool:
    """Compare resource versions, which are rising numbers; anything else counts as newer if it differs."""
    if version.isdecimal() and than.isdecimal():
        return int(version) > int(than)
    return version != than
