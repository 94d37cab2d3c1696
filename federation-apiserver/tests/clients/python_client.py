"""What programs do with the Python client, against the hub API: `python_client.py CASE`, with KUBECONFIG in the environment.

Each case makes a namespace of its own, so that all may run on one server. It ends with an exception when something is not
as a kube-apiserver has it.
"""

import ssl
import sys
import threading
import time
import urllib.request

import yaml
from kubernetes import client, config, dynamic, utils, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.leaderelection import electionconfig, leaderelection
from kubernetes.leaderelection.resourcelock.configmaplock import ConfigMapLock
from kubernetes.leaderelection.resourcelock.leaselock import LeaseLock

# Longest wait for anything; the machine may be busy.
LIMIT = 60


def wait_for(what, look):
    """Looks until there is something true."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    raise TimeoutError(what)


def refused(code, call):
    """The ApiException of a call that has to fail with this code."""
    try:
        answer = call()
    except ApiException as error:
        assert error.status == code, error
        return error
    raise AssertionError(f"was not refused: {answer}")


def namespace(core, name):
    core.create_namespace({"metadata": {"name": name}})
    return name


def config_map(name, **data):
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def events(watcher, *args, **kwargs):
    """(type, name) of what a watch of so many seconds tells."""
    return [(e["type"], e["object"].metadata.name) for e in watcher.stream(*args, **kwargs)]


def case_watch(core):
    """Typed events as they come, an end after the timeout, and going on from there without loss."""
    ns = namespace(core, "py-watch")
    start = core.list_namespaced_config_map(ns).metadata.resource_version
    core.create_namespaced_config_map(ns, config_map("a", k="1"))
    core.patch_namespaced_config_map("a", ns, {"data": {"k": "2"}})
    core.delete_namespaced_config_map("a", ns)
    watcher = watch.Watch()
    seen = events(watcher, core.list_namespaced_config_map, ns, resource_version=start, timeout_seconds=1)
    assert seen == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")], seen

    core.create_namespaced_config_map(ns, config_map("b"))
    left_at = watcher.resource_version
    seen = events(watcher, core.list_namespaced_config_map, ns, resource_version=left_at, timeout_seconds=1)
    assert seen == [("ADDED", "b")], seen

    # Without a revision: what there is, then what comes. `stop` ends it in the middle.
    live = watch.Watch()
    seen = []
    for event in live.stream(core.list_namespaced_config_map, ns):
        assert isinstance(event["object"], client.V1ConfigMap), event
        seen.append((event["type"], event["object"].metadata.name))
        if len(seen) == 1:
            core.create_namespaced_config_map(ns, config_map("c", text="é\u2028\n\x00"))
        if len(seen) == 2:
            assert event["object"].data["text"] == "é\u2028\n\x00", event
            live.stop()
    assert seen == [("ADDED", "b"), ("ADDED", "c")], seen

    # Only what a selector names; what stops to match looks deleted.
    core.patch_namespaced_config_map("b", ns, {"metadata": {"labels": {"tier": "front"}}})
    start = core.list_namespaced_config_map(ns).metadata.resource_version
    core.patch_namespaced_config_map("b", ns, {"metadata": {"labels": {"tier": None}}})
    core.patch_namespaced_config_map("c", ns, {"metadata": {"labels": {"tier": "front"}}})
    options = {"resource_version": start, "timeout_seconds": 1, "label_selector": "tier=front"}
    seen = events(watch.Watch(), core.list_namespaced_config_map, ns, **options)
    assert seen == [("DELETED", "b"), ("ADDED", "c")], seen

    # Who allows bookmarks may get some.
    options = {"resource_version": start, "timeout_seconds": 1, "allow_watch_bookmarks": True}
    names = [e["type"] for e in watch.Watch().stream(core.list_namespaced_config_map, ns, **options)]
    assert names[:2] == ["MODIFIED", "MODIFIED"] and set(names[2:]) <= {"BOOKMARK"}, names


def case_initial_events(core):
    """A list as the beginning of a watch."""
    ns = namespace(core, "py-initial")
    for name in ("a", "b"):
        core.create_namespaced_config_map(ns, config_map(name))
    maps = dynamic.DynamicClient(client.ApiClient()).resources.get(api_version="v1", kind="ConfigMap")
    watcher = watch.Watch()
    seen = []
    for event in maps.watch(
        namespace=ns,
        watcher=watcher,
        allow_watch_bookmarks=True,
        send_initial_events=True,
        resource_version_match="NotOlderThan",
    ):
        seen.append((event["type"], event["object"].metadata.name))
        if event["type"] == "BOOKMARK":
            assert event["object"].metadata.annotations["k8s.io/initial-events-end"] == "true", event
            watcher.stop()
    assert seen == [("ADDED", "a"), ("ADDED", "b"), ("BOOKMARK", None)], seen


def case_expired(core):
    """A revision that is compacted is 410 in watches and lists; the server of this case keeps few revisions."""
    ns = namespace(core, "py-expired")
    for name in ("a", "b", "c"):
        core.create_namespaced_config_map(ns, config_map(name))
    first = core.list_namespaced_config_map(ns, limit=2)
    start = first.metadata.resource_version
    # More than is kept in memory as well.
    for i in range(24):
        core.patch_namespaced_config_map("a", ns, {"data": {"large": str(i) * 300_000}})

    def expired():
        options = {"resource_version": start, "timeout_seconds": 1}
        try:
            for _ in watch.Watch().stream(core.list_namespaced_config_map, ns, **options):
                return None
        except ApiException as error:
            return error

    error = wait_for("the watch to be too late", expired)
    assert error.status == 410 and "Expired" in error.reason, error
    # Without a timeout the client asks once more, and then says so too.
    refused(410, lambda: list(watch.Watch().stream(core.list_namespaced_config_map, ns, resource_version=start)))

    token = first.metadata._continue
    error = refused(410, lambda: core.list_namespaced_config_map(ns, limit=2, _continue=token))
    token = yaml.safe_load(error.body)["metadata"]["continue"]
    rest = core.list_namespaced_config_map(ns, limit=2, _continue=token)
    assert [o.metadata.name for o in rest.items] == ["c"], rest


def case_pages(core):
    """Lists in pages, of one revision."""
    ns = namespace(core, "py-pages")
    names = [f"m{i:02}" for i in range(25)]
    for name in names:
        core.create_namespaced_config_map(ns, config_map(name))
    seen, token, revisions, remaining = [], None, set(), []
    while True:
        page = core.list_namespaced_config_map(ns, limit=10, _continue=token)
        seen += [o.metadata.name for o in page.items]
        revisions.add(page.metadata.resource_version)
        remaining.append(page.metadata.remaining_item_count)
        token = page.metadata._continue
        if not token:
            break
        core.delete_namespaced_config_map(seen[-1], ns)
    assert seen == names and len(revisions) == 1 and remaining == [15, 5, None], (seen, revisions, remaining)
    selected = core.list_namespaced_config_map(ns, field_selector="metadata.name=m03")
    assert [o.metadata.name for o in selected.items] == ["m03"], selected
    core.delete_collection_namespaced_config_map(ns)
    assert core.list_namespaced_config_map(ns).items == []


def elect(lock_of, ns):
    """Two candidates for one lock: one leads, and when it stops to renew, the other."""
    leading = {}
    threads = {}
    held = threading.Event()

    class Gone(Exception):
        """The leader is away."""

    class Lock:
        """A lock whose holder can be cut off from the server."""

        def __init__(self, identity):
            self.inner = lock_of("the-lock", ns, identity)
            self.name, self.namespace, self.identity = "the-lock", ns, identity
            self.cut = False

        def get(self, name, namespace):
            if self.cut:
                raise Gone()
            return self.inner.get(name, namespace)

        def create(self, name, namespace, election_record):
            return self.inner.create(name, namespace, election_record)

        def update(self, name, namespace, updated_record):
            return self.inner.update(name, namespace, updated_record)

    locks = {who: Lock(who) for who in ("one", "two")}

    def run(who):
        def started():
            leading[who] = time.monotonic()
            held.wait()

        chosen = electionconfig.Config(
            locks[who],
            lease_duration=4,
            renew_deadline=3,
            retry_period=1,
            onstarted_leading=started,
            onstopped_leading=lambda: None,
        )
        try:
            leaderelection.LeaderElection(chosen).run()
        except Gone:
            pass

    for who in locks:
        threads[who] = threading.Thread(target=run, args=(who,), daemon=True)
        threads[who].start()
    leader = wait_for("a leader", lambda: next(iter(leading), None))
    other = "two" if leader == "one" else "one"
    # Beyond its first lease: it is renewed, and the other keeps out.
    time.sleep(5)
    assert list(leading) == [leader], leading
    locks[leader].cut = True
    wait_for("the other to lead", lambda: other in leading)
    locks[other].cut = True
    held.set()
    for thread in threads.values():
        thread.join(LIMIT)
    return other


def case_leader_lease(core):
    """Leader election on a Lease."""
    ns = namespace(core, "py-lease")
    last = elect(LeaseLock, ns)
    lease = client.CoordinationV1Api().read_namespaced_lease("the-lock", ns)
    assert lease.spec.holder_identity == last and lease.spec.lease_duration_seconds == 4, lease
    # Equal when the last leader was cut off before it renewed.
    assert lease.spec.renew_time >= lease.spec.acquire_time, lease

    # Of two who have read the same lease one writes it.
    leases = client.CoordinationV1Api()
    first, second = leases.read_namespaced_lease("the-lock", ns), leases.read_namespaced_lease("the-lock", ns)
    first.spec.holder_identity = "first"
    second.spec.holder_identity = "second"
    leases.replace_namespaced_lease("the-lock", ns, first)
    assert "Conflict" in refused(409, lambda: leases.replace_namespaced_lease("the-lock", ns, second)).body


def case_leader_config_map(core):
    """Leader election on an annotation of a ConfigMap."""
    ns = namespace(core, "py-config-map")
    last = elect(ConfigMapLock, ns)
    annotations = core.read_namespaced_config_map("the-lock", ns).metadata.annotations
    assert last in annotations["control-plane.alpha.kubernetes.io/leader"], annotations


GADGETS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: pygadgets.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: pygadgets, singular: pygadget, kind: PyGadget}
  versions:
  - name: v1
    served: true
    storage: true
    subresources: {status: {}, scale: {specReplicasPath: .spec.size, statusReplicasPath: .status.size}}
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            properties:
              size: {type: integer, minimum: 1}
              parts:
                type: array
                x-kubernetes-list-type: map
                x-kubernetes-list-map-keys: [name]
                items:
                  type: object
                  required: [name]
                  properties: {name: {type: string}, weight: {type: integer}}
          status:
            type: object
            properties: {size: {type: integer}}
"""


def case_apply(core):
    """Server-side apply through the dynamic client: owners, conflicts, force, given-up fields, on our own kind too."""
    ns = namespace(core, "py-apply")
    found = dynamic.DynamicClient(client.ApiClient())
    maps = found.resources.get(api_version="v1", kind="ConfigMap")
    maps.server_side_apply(namespace=ns, body=config_map("m", a="1", b="1"), field_manager="one")
    error = refused(
        409,
        lambda: maps.server_side_apply(namespace=ns, body=config_map("m", a="2"), field_manager="two"),
    )
    assert 'conflict with \\"one\\"' in str(error.body) and ".data.a" in str(error.body), error
    forced = maps.server_side_apply(
        namespace=ns, body=config_map("m", a="2"), field_manager="two", force_conflicts=True
    )
    assert forced.data.to_dict() == {"a": "2", "b": "1"}, forced
    # What the first gives up goes, but for what the other has taken over.
    kept = maps.server_side_apply(namespace=ns, body=config_map("m"), field_manager="one")
    assert kept.data.to_dict() == {"a": "2"}, kept
    owners = {entry.manager: entry.operation for entry in kept.metadata.managedFields}
    assert owners["two"] == "Apply", owners
    dry = maps.server_side_apply(
        namespace=ns, body=config_map("m", a="3"), field_manager="two", dry_run="All"
    )
    assert dry.data.a == "3" and maps.get(name="m", namespace=ns).data.a == "2", dry
    # The typed client's way to say the same.
    typed = core.patch_namespaced_config_map(
        "typed",
        ns,
        config_map("typed", k="v"),
        field_manager="typed",
        _content_type="application/apply-patch+yaml",
    )
    assert typed.metadata.managed_fields[0].operation == "Apply", typed

    utils.create_from_yaml(client.ApiClient(), yaml_objects=[yaml.safe_load(GADGETS)])

    def established():
        crd = client.ApiextensionsV1Api().read_custom_resource_definition("pygadgets.example.com")
        conditions = (crd.status and crd.status.conditions) or []
        return any(c.type == "Established" and c.status == "True" for c in conditions)

    wait_for("the definition to be established", established)
    found = dynamic.DynamicClient(client.ApiClient())
    gadgets = found.resources.get(api_version="example.com/v1", kind="PyGadget")

    def gadget(**spec):
        meta = {"name": "g", "namespace": ns}
        return {"apiVersion": "example.com/v1", "kind": "PyGadget", "metadata": meta, "spec": spec}

    gadgets.server_side_apply(body=gadget(size=2, parts=[{"name": "x", "weight": 1}]), field_manager="one")
    both = gadgets.server_side_apply(body=gadget(parts=[{"name": "y", "weight": 2}]), field_manager="two")
    assert [p.name for p in both.spec.parts] == ["x", "y"], both
    refused(409, lambda: gadgets.server_side_apply(body=gadget(size=3), field_manager="two"))
    error = refused(
        422,
        lambda: gadgets.server_side_apply(body=gadget(size=0), field_manager="one"),
    )
    assert "should be greater than or equal to 1" in str(error.body), error
    gadgets.status.patch(
        name="g", namespace=ns, body={"status": {"size": 2}}, content_type="application/merge-patch+json"
    )
    custom = client.CustomObjectsApi()
    where = ("example.com", "v1", ns, "pygadgets")
    scale = custom.get_namespaced_custom_object_scale(*where, "g")
    assert (scale["spec"], scale["status"]["replicas"]) == ({"replicas": 2}, 2), scale
    # Merge patches as older programs send them, and a watch of plain dictionaries.
    start = custom.list_namespaced_custom_object(*where)["metadata"]["resourceVersion"]
    custom.patch_namespaced_custom_object(*where, "g", {"spec": {"size": 5}})
    custom.delete_namespaced_custom_object(*where, "g")
    options = {"resource_version": start, "timeout_seconds": 1}
    seen = [
        (e["type"], e["object"]["spec"]["size"])
        for e in watch.Watch().stream(custom.list_namespaced_custom_object, *where, **options)
    ]
    assert seen == [("MODIFIED", 5), ("DELETED", 5)], seen


MANIFEST = """
apiVersion: v1
kind: Secret
metadata: {name: s, namespace: py-manifest}
stringData: {password: hidden}
---
apiVersion: v1
kind: List
items:
- apiVersion: rbac.authorization.k8s.io/v1
  kind: Role
  metadata: {name: r, namespace: py-manifest}
  rules: [{apiGroups: [""], resources: [secrets], verbs: [get]}]
- apiVersion: v1
  kind: ServiceAccount
  metadata: {name: robot, namespace: py-manifest}
"""


def case_manifest(core):
    """Objects of a manifest, what is there already told by name, and an account whose token works."""
    ns = namespace(core, "py-manifest")
    api = client.ApiClient()
    objects = list(yaml.safe_load_all(MANIFEST))
    utils.create_from_yaml(api, yaml_objects=objects)
    assert core.read_namespaced_secret("s", ns).data == {"password": "aGlkZGVu"}
    try:
        utils.create_from_yaml(api, yaml_objects=objects)
        raise AssertionError("created twice")
    except utils.FailToCreateError as error:
        assert [e.reason for e in error.api_exceptions] == ["Conflict"] * 3, error
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "b", "namespace": ns},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"},
        "subjects": [{"kind": "ServiceAccount", "name": "robot", "namespace": ns}],
    }
    utils.create_from_dict(api, binding)
    token = core.create_namespaced_service_account_token("robot", ns, {"spec": {}}).status.token
    robot = client.Configuration.get_default_copy()
    robot.cert_file = robot.key_file = None
    robot.api_key = {"authorization": f"Bearer {token}"}
    as_robot = client.CoreV1Api(client.ApiClient(robot))
    wait_for("the role to count", lambda: readable(as_robot, ns))
    error = refused(403, lambda: as_robot.list_namespaced_secret(ns))
    assert "system:serviceaccount:py-manifest:robot" in str(error.body), error
    review = {"spec": {"resourceAttributes": {"verb": "get", "resource": "secrets", "namespace": ns}}}
    assert client.AuthorizationV1Api(client.ApiClient(robot)).create_self_subject_access_review(review).status.allowed
    core.delete_namespace(ns)
    wait_for("the namespace to go", lambda: ns not in [n.metadata.name for n in core.list_namespace().items])


def readable(core, ns):
    try:
        return core.read_namespaced_secret("s", ns)
    except ApiException as error:
        assert error.status == 403, error
        return None


def case_certificates(_):
    """The serving certificate under the strict rules that Python has by default since 3.13."""
    chosen = client.Configuration.get_default_copy()
    context = ssl.create_default_context(cafile=chosen.ssl_ca_cert)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_cert_chain(chosen.cert_file, chosen.key_file)
    with urllib.request.urlopen(chosen.host + "/readyz", context=context, timeout=LIMIT) as answer:
        assert answer.read() == b"ok"


def main():
    config.load_kube_config()
    globals()["case_" + sys.argv[1]](client.CoreV1Api())


main()
