"""The fields of a KubeRay v1.7.0 RayJob. Those that raylhf sets are typed; others may be there, if they exist."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from raylhf.config.schema import nearest

Quantity = Annotated[str, Field(pattern=r"^(\d+\.?\d*|\.\d+)([num]|[kMGTPE]|[KMGTPE]i|[eE]-?\d+)?$")] | int
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Texts = dict[str, str]


class Part(BaseModel):
    """A mapping that may have its typed fields and those in FREE."""

    model_config = ConfigDict(extra="allow", strict=True)
    FREE: ClassVar[str] = ""

    @model_validator(mode="after")
    def _refuse_unknown(self) -> "Part":
        free = self.FREE.split()
        for name in self.model_extra or {}:
            if name not in free:
                known = [*type(self).model_fields, *free]
                near = nearest(name, known)
                raise ValueError(f"there is no field {name!r}" + (f"; did you mean {near!r}?" if near else ""))
        return self


class Metadata(Part):
    FREE = "creationTimestamp finalizers generateName generation managedFields ownerReferences resourceVersion uid"
    name: Name
    namespace: Name | None = None
    labels: Texts = {}
    annotations: Texts = {}


class TemplateMetadata(Part):
    FREE = "name namespace finalizers"
    labels: Texts = {}
    annotations: Texts = {}


class Resources(Part):
    FREE = "claims"
    limits: dict[str, Quantity] = {}
    requests: dict[str, Quantity] = {}


class Variable(Part):
    name: str
    value: str | None = None
    valueFrom: dict[str, Any] | None = None


class Port(Part):
    FREE = "hostIP hostPort"
    name: str | None = None
    containerPort: Annotated[int, Field(ge=1, le=65_535)]
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None


class VolumeMount(Part):
    FREE = "mountPropagation recursiveReadOnly subPath subPathExpr"
    name: str
    mountPath: str
    readOnly: bool | None = None


class ContainerSecurity(Part):
    FREE = "appArmorProfile procMount seLinuxOptions seccompProfile windowsOptions"
    allowPrivilegeEscalation: bool | None = None
    privileged: bool | None = None
    readOnlyRootFilesystem: bool | None = None
    runAsNonRoot: bool | None = None
    runAsUser: int | None = None
    runAsGroup: int | None = None
    capabilities: dict[Literal["add", "drop"], list[str]] = {}


class Container(Part):
    FREE = (
        "envFrom imagePullPolicy lifecycle livenessProbe readinessProbe resizePolicy restartPolicy restartPolicyRules "
        "startupProbe stdin stdinOnce terminationMessagePath terminationMessagePolicy tty volumeDevices"
    )
    name: Name
    image: Annotated[str, Field(min_length=1)]
    command: list[str] = []
    args: list[str] = []
    workingDir: str | None = None
    env: list[Variable] = []
    ports: list[Port] = []
    resources: Resources = Resources()
    securityContext: ContainerSecurity | None = None
    volumeMounts: list[VolumeMount] = []


class Volume(Part):
    FREE = (
        "awsElasticBlockStore azureDisk azureFile cephfs cinder configMap csi downwardAPI emptyDir ephemeral fc "
        "flexVolume flocker gcePersistentDisk gitRepo glusterfs hostPath image iscsi nfs persistentVolumeClaim "
        "photonPersistentDisk portworxVolume projected quobyte rbd scaleIO secret storageos vsphereVolume"
    )
    name: Name


class PodSecurity(Part):
    FREE = (
        "appArmorProfile fsGroupChangePolicy seLinuxChangePolicy seLinuxOptions seccompProfile supplementalGroups "
        "supplementalGroupsPolicy sysctls windowsOptions"
    )
    runAsNonRoot: bool | None = None
    runAsUser: int | None = None
    runAsGroup: int | None = None
    fsGroup: int | None = None


class PodSpec(Part):
    FREE = (
        "activeDeadlineSeconds affinity dnsConfig dnsPolicy enableServiceLinks ephemeralContainers hostAliases hostIPC "
        "hostNetwork hostPID hostUsers hostname hostnameOverride imagePullSecrets nodeName os overhead "
        "preemptionPolicy priority priorityClassName readinessGates resourceClaims resources runtimeClassName "
        "schedulerName schedulingGates schedulingGroup serviceAccount serviceAccountName setHostnameAsFQDN "
        "shareProcessNamespace subdomain topologySpreadConstraints"
    )
    containers: list[Container]
    initContainers: list[Container] = []
    volumes: list[Volume] = []
    nodeSelector: Texts = {}
    tolerations: list[dict[str, Any]] = []
    automountServiceAccountToken: bool | None = None
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    securityContext: PodSecurity | None = None
    terminationGracePeriodSeconds: int | None = None

    @model_validator(mode="after")
    def _require_volumes(self) -> "PodSpec":
        there = [volume.name for volume in self.volumes]
        _refuse_twice("volumes are", there)
        _refuse_twice("containers are", [container.name for container in (*self.initContainers, *self.containers)])
        for container in (*self.initContainers, *self.containers):
            _refuse_twice(f"mounts of {container.name} are", [mount.mountPath for mount in container.volumeMounts])
            for mount in container.volumeMounts:
                if mount.name not in there:
                    raise ValueError(f"container {container.name} mounts {mount.name!r}, which is not among volumes")
        return self


def _refuse_twice(what: str, names: list[str]) -> None:
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two {what} called {', '.join(sorted(twice))}")


class PodTemplate(Part):
    metadata: TemplateMetadata = TemplateMetadata()
    spec: PodSpec


class HeadGroup(Part):
    FREE = "enableIngress headService ingressOptions serviceType"
    labels: Texts = {}
    rayStartParams: Texts = {}
    resources: dict[str, Quantity] = {}
    template: PodTemplate


class WorkerGroup(Part):
    FREE = "scaleStrategy"
    groupName: Name
    replicas: int | None = None
    minReplicas: Annotated[int, Field(ge=0)] = 0
    maxReplicas: Annotated[int, Field(ge=0)] = 2_147_483_647
    numOfHosts: Annotated[int, Field(ge=1)] = 1
    idleTimeoutSeconds: Annotated[int, Field(ge=0)] | None = None
    priority: int | None = None
    suspend: bool | None = None
    labels: Texts = {}
    rayStartParams: Texts = {}
    resources: dict[str, Quantity] = {}
    template: PodTemplate


class AuthOptions(Part):
    FREE = "enableK8sTokenAuth secretName"
    mode: Literal["token", "disabled"] | None = None


class AutoscalerOptions(Part):
    FREE = "args command env envFrom image imagePullPolicy volumeMounts"
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: int | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    resources: Resources = Resources()
    securityContext: ContainerSecurity | None = None


class HeadStateOptions(Part):
    FREE = "backend externalStorageNamespace redisUsername storage"
    redisAddress: str | None = None
    redisPassword: dict[str, Any] | None = None


class ClusterSpec(Part):
    FREE = "headServiceAnnotations historyServerOptions managedBy networkPolicy suspend tlsOptions upgradeStrategy"
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+(\.\d+)?")] | None = None
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: HeadStateOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class JobSpec(Part):
    FREE = "entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata runtimeEnvYAML"
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int | None = None
    activeDeadlineSeconds: int | None = None
    preRunningDeadlineSeconds: Annotated[int, Field(ge=1)] | None = None
    backoffLimit: int | None = None
    suspend: bool | None = None
    clusterSelector: Texts | None = None
    submitterConfig: dict[str, Any] | None = None
    submitterPodTemplate: dict[str, Any] | None = None
    deletionStrategy: dict[str, Any] | None = None
    rayClusterSpec: ClusterSpec | None = None


class RayJob(Part):
    FREE = "status"
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
