"""What must hold of rendered manifests. Each policy gives its faults, one line each; none: all is well."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence

from ppod_deploy.ranks import rank_environments
from ppod_services.core.server import _FLUSH_TIMEOUT_S
from ppod_services.generation.config import GenerationServiceConfig
from support.manifests import Object, Workload, mounted_files, of_kind, workloads
from support.processes import ROOT

from .configurations import GRPC_SERVICES, configuration, service_configuration, trainer_configuration

Faults = Iterator[str]
Policy = Callable[[Sequence[Object]], Faults]

_SAFE_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_LAST_REPLIES_S = 0.2 + _FLUSH_TIMEOUT_S
_CLIENT_LOOKS_S = 10.0


def _services(objects: Sequence[Object]) -> list[Workload]:
    return [one for one in workloads(objects) if one.kind == "Deployment"]


def _trainers(objects: Sequence[Object]) -> list[Workload]:
    return [one for one in workloads(objects) if one.kind != "Deployment"]


def restricted(objects: Sequence[Object]) -> Faults:
    """Pod Security "restricted", as its standard lists it, and more: read-only root, a user of its own."""
    for space in of_kind(objects, "Namespace").values():
        labels = space["metadata"]["labels"]
        for mode in ("enforce", "warn", "audit"):
            if labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                yield f"namespace: pod security is not restricted for {mode}"
    for one in workloads(objects):
        pod, container = one.pod, one.container
        security, own = pod.get("securityContext", {}), container.get("securityContext", {})
        wanted = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001}
        for key, value in wanted.items():
            if security.get(key) != value:
                yield f"{one.name}: securityContext.{key} is {security.get(key)}"
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{one.name}: no seccompProfile RuntimeDefault"
        if own.get("allowPrivilegeEscalation") is not False or own.get("readOnlyRootFilesystem") is not True:
            yield f"{one.name}: privileges may grow, or the root file system is not read-only"
        if own.get("capabilities") != {"drop": ["ALL"]} or own.get("privileged"):
            yield f"{one.name}: capabilities are left"
        if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{one.name}: shares a namespace of the host"
        for volume in pod["volumes"]:
            if not set(volume) - {"name"} <= _SAFE_VOLUMES:
                yield f"{one.name}: volume {volume['name']} is of a kind that is not allowed"


def least_privilege(objects: Sequence[Object]) -> Faults:
    """Accounts of their own; the API's token only for the trainer, which may read EndpointSlices and nothing else."""
    accounts = of_kind(objects, "ServiceAccount")
    bound = {subject["name"] for binding in of_kind(objects, "RoleBinding").values() for subject in binding["subjects"]}
    for one in workloads(objects):
        account = one.pod.get("serviceAccountName")
        if account != f"ppod-{one.component}" or account not in accounts:
            yield f"{one.name}: serviceAccountName is {account}"
        elif accounts[account].get("automountServiceAccountToken") is not False:
            yield f"{account}: mounts a token into every pod"
        if one.pod.get("automountServiceAccountToken") is not (one.component == "trainer"):
            yield f"{one.name}: automountServiceAccountToken is {one.pod.get('automountServiceAccountToken')}"
        if (account in bound) != (one.component == "trainer"):
            yield f"{one.name}: account {account} is bound to a role, or lacks one"
        if one.pod.get("enableServiceLinks") is not False:
            yield f"{one.name}: enableServiceLinks is not false"
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        yield from (f"{name}: {kind}" for name in of_kind(objects, kind))
    allowed = [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}]
    for name, role in of_kind(objects, "Role").items():
        if role["rules"] != allowed:
            yield f"{name}: allows more, or less, than reading EndpointSlices"


def graceful_end(objects: Sequence[Object]) -> Faults:
    """preStop + drain_grace_s + last replies fit into the grace; preStop outlasts what clients need to look again."""
    for one in _services(objects):
        sleep_s = one.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed_s = sleep_s + service_configuration(objects, one).drain_grace_s + _LAST_REPLIES_S
        grace_s = one.pod.get("terminationGracePeriodSeconds", 30)
        if grace_s < needed_s:
            yield f"{one.name}: {grace_s} s to end, {needed_s} s needed"
        if sleep_s <= _CLIENT_LOOKS_S:
            yield f"{one.name}: preStop of {sleep_s} s, and clients look every {_CLIENT_LOOKS_S} s"
    for one in _trainers(objects):
        if one.pod.get("terminationGracePeriodSeconds", 30) < 300:
            yield f"{one.name}: no time for a checkpoint"
        rules = one.job["podFailurePolicy"]["rules"]
        if [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule] != [[2, 3]]:
            yield f"{one.name}: starts again what a wrong configuration, or watch.stop, has ended"
        if one.pod.get("shareProcessNamespace") is not True:
            yield f"{one.name}: its process is number 1, which a signal does not end before it listens for one"
        if one.pod["restartPolicy"] != "Never" or trainer_configuration(objects, one).resume != "if_possible":
            yield f"{one.name}: does not go on from its checkpoint"


def rolling_updates(objects: Sequence[Object]) -> Faults:
    """A new pod is ready before an old one goes, and a drain of nodes takes one at a time."""
    budgets = {
        budget["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: budget["spec"]
        for budget in of_kind(objects, "PodDisruptionBudget").values()
    }
    for one in _services(objects):
        strategy = one.object["spec"]["strategy"]
        if strategy != {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}:
            yield f"{one.name}: a rolling update may take a replica away"
        if one.object["spec"].get("minReadySeconds", 0) < 10:
            yield f"{one.name}: minReadySeconds is too short for clients to find the new pod"
        if budgets.get(one.component, {}).get("maxUnavailable") != 1:
            yield f"{one.name}: no PodDisruptionBudget"
        if one.object["spec"]["selector"]["matchLabels"].items() - one.labels.items():
            yield f"{one.name}: the selector does not select its pods"
        keys = {spread["topologyKey"] for spread in one.pod.get("topologySpreadConstraints", [])}
        if keys != {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
            yield f"{one.name}: not spread over nodes and zones"
        for spread in one.pod.get("topologySpreadConstraints", []):
            if spread["labelSelector"]["matchLabels"].items() - one.labels.items():
                yield f"{one.name}: spread by labels that its pods lack"


def probes(objects: Sequence[Object]) -> Faults:
    """Native gRPC, on a port without TLS: the service's name for start and readiness, "" for life."""
    for one in _services(objects):
        config = service_configuration(objects, one)
        plain = {config.listen.health_port, None if config.tls else config.listen.port}
        for kind, service in (
            ("startupProbe", GRPC_SERVICES[one.component]),
            ("readinessProbe", GRPC_SERVICES[one.component]),
            ("livenessProbe", ""),
        ):
            probe = one.container.get(kind, {})
            asked = probe.get("grpc", {})
            if asked.get("service") != service:
                yield f"{one.name}: {kind} asks for {asked.get('service')!r}"
            if asked.get("port") not in plain:
                yield f"{one.name}: {kind} on port {asked.get('port')}, which speaks TLS or nothing"
        startup = one.container.get("startupProbe", {})
        if startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3) < 1_800:
            yield f"{one.name}: a model has too little time to load"


def ports(objects: Sequence[Object]) -> Faults:
    """Containers, Services and configuration agree on every port."""
    services = of_kind(objects, "Service")
    for one in _services(objects):
        listen = service_configuration(objects, one).listen
        wanted = {
            "grpc": listen.port,
            "admin": listen.admin_port,
            "metrics": listen.metrics_port,
            "health": listen.health_port,
        }
        if {name: port for name, port in wanted.items() if port is not None} != one.ports:
            yield f"{one.name}: the container's ports are {one.ports}, the configuration's {wanted}"
        if listen.host != "0.0.0.0":
            yield f"{one.name}: listens on {listen.host}"
        tls = service_configuration(objects, one).tls is not None
        for name, expected in ((one.name, ["grpc", "admin", "metrics"]), (f"{one.name}-headless", ["grpc", "admin"])):
            yield from _service_faults(services.get(name), one, expected, tls=tls)
    for one in _trainers(objects):
        metrics = trainer_configuration(objects, one).metrics
        if one.ports != {"metrics": metrics.port} or metrics.host != "0.0.0.0":
            yield f"{one.name}: metrics are on {metrics.host}:{metrics.port}, the container says {one.ports}"


def _service_faults(service: Object | None, one: Workload, expected: list[str], *, tls: bool) -> Faults:
    if service is None:
        yield f"{one.name}: a Service is missing"
        return
    name, spec = service["metadata"]["name"], service["spec"]
    if name.endswith("-headless") != (spec.get("clusterIP") == "None"):
        yield f"{name}: clusterIP is {spec.get('clusterIP')}"
    if spec["selector"].items() - one.labels.items():
        yield f"{name}: selects no pod of {one.name}"
    if [port["name"] for port in spec["ports"]] != expected:
        yield f"{name}: ports are {[port['name'] for port in spec['ports']]}"
    for port in spec["ports"]:
        if port["targetPort"] != port["name"] or one.ports.get(port["name"]) != port["port"]:
            yield f"{name}: port {port['name']} leads elsewhere"
        protocol = "http" if port["name"] == "metrics" else "https" if tls else "kubernetes.io/h2c"
        if port.get("appProtocol") != protocol:
            yield f"{name}: appProtocol of {port['name']} is {port.get('appProtocol')}, expected {protocol}"


def configurations(objects: Sequence[Object]) -> Faults:
    """Every file is one that the code takes, and the targets of the trainer are Services that are there."""
    services = of_kind(objects, "Service")
    for one in workloads(objects):
        config = configuration(objects, one)
        vllm = isinstance(config, GenerationServiceConfig) and config.backend == "vllm"
        if vllm and "ppod-generation:" not in one.container["image"]:
            yield f"{one.name}: image {one.container['image']} has no vLLM"
    for one in _trainers(objects):
        config = trainer_configuration(objects, one)
        targets = config.services
        for target in (
            *(targets.reward, targets.reference, targets.generation),
            *(targets.reference_admin, targets.generation_admin),
        ):
            if not target.startswith("k8s:///"):
                yield f"{one.name}: target {target} does not follow its pods"
            if not _is_port(services, target):
                yield f"{one.name}: target {target} is no port of a Service here"


def _is_port(services: Mapping[str, Object], target: str) -> bool:
    """Whether `k8s:///SERVICE:PORT-NAME` or `SERVICE:NUMBER` is a port of one of these."""
    name, _, port = target.removeprefix("k8s:///").partition(":")
    key = "name" if target.startswith("k8s:///") else "port"
    return name in services and port in {str(each[key]) for each in services[name]["spec"]["ports"]}


def credentials(objects: Sequence[Object]) -> Faults:
    """Files that the configuration names are mounted; who has TLS or teams is not left open."""
    for one in workloads(objects):
        mounted = mounted_files(objects, one)
        if one.component == "trainer":
            config = trainer_configuration(objects, one)
            tls = config.services.tls
            named = [] if tls is None else [tls.ca_file, tls.certificate_file, tls.key_file]
            if "PPOD_TOKEN_FILE" in one.environment:
                named.append(one.environment["PPOD_TOKEN_FILE"]["value"])
                if tls is None and not config.services.plain_text_token:
                    yield f"{one.name}: has a token that it may not send"
        else:
            service = service_configuration(objects, one)
            named = [service.tenancy.teams_file]
            for each in (service.tls, service.admin_tls):
                named += [] if each is None else [each.certificate_file, each.private_key_file, each.client_ca_file]
            if (service.tls or service.tenancy.teams_file) and service.tenancy.open_admin:
                yield f"{one.name}: the administration port is open"
        yield from (f"{one.name}: {path} is not mounted" for path in named if path and str(path) not in mounted)


def resources(objects: Sequence[Object]) -> Faults:
    """Requests and limits, threads by the limit, pinned images, memory for /dev/shm, GPUs on nodes that have them."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for one in workloads(objects):
        container = one.container
        given = container["resources"]
        for key in ("cpu", "memory", "ephemeral-storage"):
            if key not in given["requests"] or key not in given["limits"]:
                yield f"{one.name}: no request, or no limit, of {key}"
        if not container["image"].endswith(f":{version}") or container["imagePullPolicy"] != "IfNotPresent":
            yield f"{one.name}: image {container['image']}, version {version}"
        threads = one.environment.get("OMP_NUM_THREADS", {}).get("valueFrom", {}).get("resourceFieldRef", {})
        if threads.get("resource") != "limits.cpu" or threads.get("containerName") != container["name"]:
            yield f"{one.name}: torch takes a thread for each core of the node"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in one.pod["volumes"]}
        shm = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
        if shm.get("medium") != "Memory" or "sizeLimit" not in shm:
            yield f"{one.name}: /dev/shm is no bounded memory"
        for path in ("/tmp", "/models", "/etc/ppod", *(["/runs"] if one.component == "trainer" else [])):
            if mounts.get(path) not in volumes:
                yield f"{one.name}: nothing is mounted at {path}"
        if "nvidia.com/gpu" in given["limits"]:
            tolerated = {toleration["key"] for toleration in one.pod.get("tolerations", [])}
            if "nvidia.com/gpu" not in tolerated or "nvidia.com/gpu.present" not in one.pod.get("nodeSelector", {}):
                yield f"{one.name}: asks for a GPU and not for a node that has one"


def references(objects: Sequence[Object]) -> Faults:
    """What objects name is there: ConfigMaps, claims, targets of budgets, autoscalers and bindings."""
    claims = of_kind(objects, "PersistentVolumeClaim")
    deployments = of_kind(objects, "Deployment")
    seen: set[tuple[str, str]] = set()
    for one in objects:
        key = (one["kind"], one["metadata"]["name"])
        if key in seen:
            yield f"{key}: twice"
        seen.add(key)
        if one["kind"] != "Namespace" and one["metadata"].get("namespace") != "ppod":
            yield f"{key}: namespace is {one['metadata'].get('namespace')}"
        labels = one["metadata"].get("labels", {})
        if labels.get("app.kubernetes.io/name") != "ppod" or labels.get("app.kubernetes.io/part-of") != "ppod":
            yield f"{key}: labels are {labels}"
    for one in workloads(objects):
        for volume in one.pod["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield f"{one.name}: claim {claim} is not there"
        if one.labels.get("app.kubernetes.io/component") != one.component:
            yield f"{one.name}: its pods are labelled otherwise"
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        for name, scaler in of_kind(objects, kind).items():
            target = scaler["spec"]["scaleTargetRef"]["name"]
            if target not in deployments or "replicas" in deployments[target]["spec"]:
                yield f"{name}: scales {target}, which is not there or says its number itself"


def monitors(objects: Sequence[Object]) -> Faults:
    """Each pod is scraped once, and labelled as rules and dashboards expect."""
    services, per_service = of_kind(objects, "Service"), of_kind(objects, "ServiceMonitor")
    per_pod = of_kind(objects, "PodMonitor")
    if not per_service and not per_pod:
        return
    scraped: dict[str, int] = {one.name: 0 for one in workloads(objects)}
    for monitor in per_service.values():
        wanted = monitor["spec"]["selector"]["matchLabels"]
        ports = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        for service in services.values():
            if not wanted.items() - service["metadata"]["labels"].items():
                hit = ports & {port["name"] for port in service["spec"]["ports"]}
                scraped[service["metadata"]["name"].removesuffix("-headless")] += len(hit)
    for monitor in per_pod.values():
        wanted = monitor["spec"]["selector"]["matchLabels"]
        for one in workloads(objects):
            if not wanted.items() - one.labels.items():
                scraped[one.name] += len(
                    {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} & set(one.ports)
                )
    yield from (f"{name}: is scraped {count} times" for name, count in scraped.items() if count != 1)
    for monitor in (*per_service.values(), *per_pod.values()):
        for endpoint in monitor["spec"].get("endpoints", []) + monitor["spec"].get("podMetricsEndpoints", []):
            given = {
                rule["targetLabel"]: rule["sourceLabels"] for rule in endpoint["relabelings"] if "targetLabel" in rule
            }
            if given != {"component": ["__meta_kubernetes_pod_label_app_kubernetes_io_component"]}:
                yield f"{monitor['metadata']['name']}: labels are {given}"


def ranks(objects: Sequence[Object]) -> Faults:
    """The ranks of a JobSet find each other and end together."""
    for one in _trainers(objects):
        if one.kind == "Job":
            continue
        # What the launcher tells ranks that it starts itself.
        missing = set(rank_environments(2)[0]) - set(one.environment)
        yield from (f"{one.name}: {name} is not told" for name in sorted(missing))
        spec, values = one.job, {name: given.get("value") for name, given in one.environment.items()}
        if not spec["completions"] == spec["parallelism"] == int(values["WORLD_SIZE"]):
            yield f"{one.name}: completions, parallelism and WORLD_SIZE differ"
        [replicated] = one.object["spec"]["replicatedJobs"]
        subdomain = one.object["spec"]["network"].get("subdomain", one.name)
        if values["MASTER_ADDR"] != f"{one.name}-{replicated['name']}-0-0.{subdomain}":
            yield f"{one.name}: MASTER_ADDR is {values['MASTER_ADDR']}"
        rank = one.environment["RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
        if rank != "metadata.annotations['batch.kubernetes.io/job-completion-index']":
            yield f"{one.name}: RANK is {rank}"
        if spec["completionMode"] != "Indexed" or spec["backoffLimit"] != 0:
            yield f"{one.name}: a rank would come back alone"
        runs = of_kind(objects, "PersistentVolumeClaim")["ppod-runs"]["spec"]["accessModes"]
        if runs != ["ReadWriteMany"]:
            yield f"{one.name}: ranks on several nodes write to a volume that is {runs}"


POLICIES: tuple[Policy, ...] = (
    restricted,
    least_privilege,
    graceful_end,
    rolling_updates,
    probes,
    ports,
    configurations,
    credentials,
    resources,
    references,
    monitors,
    ranks,
)
