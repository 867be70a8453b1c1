"""The daemon's life: everything or nothing at the start, reload on HUP, an orderly end on TERM and INT."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import resource
import sys
from dataclasses import dataclass

from ..config.argv import Invocation
from ..config.load import Loaded, Loader
from ..config.workers import parse_workers
from ..core.errors import GostnetError, KernelError
from ..core.hub import current_hub
from ..core.log import Logger
from ..core.tasks import Scope, in_thread, run
from ..pipeline.service import Service
from .assemble import Assembler, Assembly
from .catalog import catalog
from .checking import at_its_place, check_loaded, passes
from .direct import DirectKeeper, DirectWays
from .direct_names import DirectNames
from .hooks import run_hooks
from .kernel import Kernel, KernelState, Wanted, wanted_by
from .names import system_resolver
from .routes import RouteKeeper
from .share import Share
from .signals import Signals, notify

DRAIN_TIMEOUT = 5.0
"""Seconds that connections have to end by themselves at a stop."""

RESTART = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before a failed service is restarted, by the number of failures in a row."""


def run_daemon(invocation: Invocation) -> int:
    """Run until TERM or INT; return the exit status. Errors of the configuration are printed like those of `check`."""
    loader = Loader(invocation)
    loaded = loader.load()
    if not passes(loaded, invocation):
        return 1
    _raise_descriptor_limit()

    async def live() -> int:
        workers = parse_workers(loaded.config.workers)
        if workers > 1:
            from .supervisor import Supervisor  # who serves alone needs none of it

            return await Supervisor(invocation, loader, workers).run(loaded)
        return await Daemon(invocation, loader).run(loaded)

    try:
        return run(live())
    except KeyboardInterrupt:
        return 0


def _raise_descriptor_limit() -> None:
    """Every connection takes two descriptors: use all that we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 20)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        pass


def assemble(
    loaded: Loaded, *, lenient: bool = False, previous: Assembly | None = None, share: Share | None = None
) -> Assembly:
    """Build the objects of a configuration, nothing of it open. Raise ConfigError or Unavailable."""
    config = loaded.config
    return Assembler(config, catalog(), system_resolver, lenient=lenient, previous=previous, share=share).build()


@dataclass(slots=True)
class _Running:
    """A service that serves, and the task that keeps it so."""

    service: Service
    task: asyncio.Task[None]


class Daemon:
    """One instance: its services, its kernel state, its signals."""

    def __init__(self, invocation: Invocation, loader: Loader, kernel: Kernel | None = None) -> None:
        """`kernel` is whoever holds the kernel's state, by default this process."""
        self._invocation = invocation
        self._loader = loader
        self._running: dict[str, _Running] = {}
        self._names = DirectNames()
        self._direct = DirectWays({}, self._names)
        self._assembly: Assembly | None = None
        self._kernel: Kernel = kernel or KernelState(invocation.instance)
        self._loading = Scope("loaders")
        self._keeping = Scope("routes")

    async def run(self, loaded: Loaded) -> int:
        """Start, serve until a signal says stop, wind down."""
        scope = Scope("daemon")
        try:
            assembly = self._assemble(loaded)
            self._assembly = assembly
        except GostnetError as exc:
            print_error(exc, loaded)
            return 1
        log = assembly.log
        signals = Signals(self._invocation.reload)
        try:
            await self._start(assembly, scope)
        except GostnetError as exc:
            log.fatal(with_hint(exc))
            log.sink.close()
            return 1
        log.info("ready", services=len(assembly.services), pid=os.getpid())
        notify("READY=1")
        await signals.serve(scope, lambda quiet: self._reload_now(scope, quiet))
        log.info("stopping")
        notify("STOPPING=1")
        await self._wind_down(scope, signals)
        log = self._assembly.log
        log.info("stopped")
        log.sink.close()
        return 0

    # ---- start ---------------------------------------------------------------------------------
    def _assemble(self, loaded: Loaded) -> Assembly:
        return assemble(loaded, lenient=self._invocation.lenient, previous=self._assembly)

    async def _start(self, assembly: Assembly, scope: Scope) -> None:
        """Claim the instance, open all listeners, apply the kernel state, accept; undo everything if a step fails."""
        self._follow_engines()
        opened: list[Service] = []
        try:
            await in_thread(assembly.trials.run)
            homes = _homes(assembly)
            try:
                for step in await in_thread(self._kernel.recover):
                    assembly.log.warn(f"left by a dead instance, undone: {step}")
            except KernelError as exc:
                if homes or exc.errno not in (errno.EPERM, errno.EACCES):
                    raise
                # Who wants nothing of the kernel need not be allowed to tidy it up either.
            await in_thread(self._kernel.claim, homes)
            for reloader in assembly.build.reloaders:
                await reloader.load()
            for service in assembly.services.values():
                await run_hooks("pre-up", assembly.hooks[service.name].pre_up, service.log)
                await self._open(service)
                opened.append(service)
            self._direct = DirectWays(assembly.services, self._names, assembly.log)
            await in_thread(self._direct.apply, self._kernel, _wanted(assembly))
        except BaseException:
            for service in opened:
                await service.aclose()
            await in_thread(self._kernel.rollback)
            raise
        for service in assembly.services.values():
            await run_hooks("post-up", assembly.hooks[service.name].post_up, service.log)
            self._serve(service, scope)
        self._keep_loading(assembly)
        self._keep_routes(assembly)
        # What lives as long as the daemon is never looked at again by the collector, and connections, which are mostly
        # freed by counting, need not start it every fourteenth time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)

    def _follow_engines(self) -> None:
        """Log what gives way to something slower, each once."""
        hub = current_hub()
        hub.tell = self._tell
        try:
            import uvloop  # noqa: F401  # `run` takes it where it is there
        except ImportError as exc:
            hub.give_way("uvloop", "asyncio", str(exc))

    def _tell(self, line: str) -> None:
        if self._assembly is not None:
            self._assembly.log.warn(line)

    async def _open(self, service: Service) -> None:
        """Bind the listener of a service that is new. Raise GostnetError."""
        await service.open()

    def _keep_routes(self, assembly: Assembly) -> None:
        """Follow the tables of routers, and links that come and go, until the next reload."""
        self._keeping = Scope("routes")
        keeper = RouteKeeper(self._direct.before(self._kernel), assembly.log)
        self._keeping.start(keeper.run(assembly.routes, lambda: _wanted(assembly)))
        direct = DirectKeeper(self._kernel, assembly.log)
        self._keeping.start(direct.run(self._direct, lambda: _wanted(assembly)))

    def _keep_loading(self, assembly: Assembly) -> None:
        """Read the sources of policies again, and probe nodes, from time to time until the next reload."""
        self._loading = Scope("loaders")
        for reloader in assembly.build.reloaders:
            self._loading.start(reloader.run())
        for probe in assembly.probes:
            self._loading.start(probe.run(), probe.name)

    async def _stop_loading(self, assembly: Assembly, successor: Assembly | None = None) -> None:
        await self._loading.cancel()
        await assembly.build.aclose(successor.build if successor is not None else None)

    def _serve(self, service: Service, scope: Scope) -> None:
        self._running[service.name] = _Running(service, scope.start(self._keep_serving(service), service.name))

    async def _keep_serving(self, service: Service) -> None:
        """Serve; a service that fails is closed, waits and opens again, and the others live on."""
        failures = 0
        while True:
            try:
                await service.serve()
                return
            except asyncio.CancelledError:
                raise
            except Exception as exc:
                pause = RESTART[min(failures, len(RESTART) - 1)]
                failures += 1
                service.log.error(f"service failed: {exc}; restarting in {pause:g}s", error=type(exc).__name__)
                await service.aclose()
                await asyncio.sleep(pause)
                try:
                    await service.open()
                except GostnetError as error:
                    service.log.error(f"cannot be restarted yet: {error}")

    # ---- reload --------------------------------------------------------------------------------
    async def _reload_now(self, scope: Scope, quiet: bool) -> None:
        """Read the configuration again and change over, or say why not and change nothing."""
        assert self._assembly is not None
        log = self._assembly.log
        try:
            loaded = await reread(self._loader, self._invocation, log)
            if loaded is None:
                return
            await self._replace(loaded, scope)
        except GostnetError as exc:
            log.error(f"reload: {with_hint(exc)}; the old configuration stays")
            return
        finally:
            notify("READY=1")
        (log.debug if quiet else log.info)("config auto reloaded" if quiet else "config reloaded")

    async def _replace(self, loaded: Loaded, scope: Scope) -> None:
        """Change over to another configuration. Raise GostnetError, with nothing changed."""
        fresh = self._assemble(loaded)
        try:
            await in_thread(fresh.trials.run)
            for reloader in fresh.build.reloaders:
                await reloader.load()
            await self._change_over(fresh, scope)
        except BaseException:
            fresh.build.close()
            raise

    async def _change_over(self, fresh: Assembly, scope: Scope) -> None:
        """Replace the services by those of `fresh`: all or nothing.

        A service whose listener is described as before keeps its socket, and with it its connections and those that
        wait to be accepted; its new connections take the new handler. Others are closed before the new ones open,
        as they may want the same port, and are opened again if a new one cannot be.
        """
        old = self._assembly
        assert old is not None
        kept = [name for name in fresh.services if name in old.services and fresh.identity[name] == old.identity[name]]
        gone = [name for name in old.services if name not in kept]
        opened: list[Service] = []
        closed: list[Service] = []
        await self._keeping.cancel()
        try:
            for name in gone:
                running = self._running[name]
                await run_hooks("pre-down", old.hooks[name].pre_down, running.service.log)
                running.task.cancel()
                await asyncio.wait((running.task,))
                await running.service.aclose()
                closed.append(running.service)
            await in_thread(self._kernel.claim, _homes(fresh))
            for name, service in fresh.services.items():
                if name not in kept:
                    await run_hooks("pre-up", fresh.hooks[name].pre_up, service.log)
                    await self._open(service)
                    opened.append(service)
            wanted = [old.services[name] for name in kept] + opened
            ways = DirectWays(fresh.services, self._names, fresh.log)
            await in_thread(ways.apply, self._kernel, fresh.routes.added_to(wanted_by(wanted)))
        except BaseException:
            for service in opened:
                await service.aclose()
            for service in closed:
                await service.open()
                self._serve(service, scope)
            await in_thread(self._direct.apply, self._kernel, _wanted(old))
            self._keep_routes(old)
            raise
        for name in kept:
            old.services[name].adopt(fresh.services[name])
            fresh.services[name] = old.services[name]
        for service in closed:
            self._running.pop(service.name, None)
            scope.start(service.drain(DRAIN_TIMEOUT), f"drain {service.name}")
            await run_hooks("post-down", old.hooks[service.name].post_down, service.log)
        for service in opened:
            await run_hooks("post-up", fresh.hooks[service.name].post_up, service.log)
            self._serve(service, scope)
        await self._stop_loading(old, fresh)
        fresh.routes.take_over(old.routes)
        self._keep_loading(fresh)
        self._direct = ways
        self._keep_routes(fresh)
        old_log, self._assembly = old.log, fresh
        if old_log.sink is not fresh.log.sink:
            old_log.sink.close()
        await asyncio.sleep(0)  # what was started above takes over, such as terms of quotas, before anybody is told

    # ---- end -----------------------------------------------------------------------------------
    async def _wind_down(self, scope: Scope, signals: Signals) -> None:
        """Stop accepting, let connections drain until a second signal, cancel the rest, give the kernel back."""
        services = [running.service for running in self._running.values()]
        await self._keeping.cancel()
        hooks = self._assembly.hooks if self._assembly is not None else {}
        for running in self._running.values():
            await run_hooks("pre-down", hooks[running.service.name].pre_down, running.service.log)
            running.task.cancel()
            await asyncio.wait((running.task,))
            await running.service.retire()
        drains = Scope("drain")

        async def hasten() -> None:
            await signals.insisted.wait()
            for service in services:
                await service.hasten()

        scope.start(hasten(), "hasten")
        for service in services:
            drains.start(service.drain(DRAIN_TIMEOUT), service.name)
        await drains.drain(DRAIN_TIMEOUT + 5)
        await drains.cancel()
        await scope.cancel()
        try:
            await in_thread(self._kernel.rollback)
        finally:
            if self._assembly is not None:
                await self._stop_loading(self._assembly)
        for service in services:
            await run_hooks("post-down", hooks[service.name].post_down, service.log)


async def reread(loader: Loader, invocation: Invocation, log: Logger) -> Loaded | None:
    """Load the configuration again for a reload; None, with the reasons in the log, if it has errors."""
    notify("RELOADING=1")
    loaded = await in_thread(loader.load)
    findings = await in_thread(check_loaded, loaded, invocation.strict, invocation.lenient)
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return loaded
    for finding in errors:
        log.error(f"reload: {finding}")
    log.error("reload: the configuration has errors; the old one stays")
    return None


def _wanted(assembly: Assembly) -> Wanted:
    """Return what the services and routers of a configuration want of the kernel."""
    return assembly.routes.added_to(wanted_by(assembly.services.values()))


def _homes(assembly: Assembly) -> set[str]:
    """Return the network namespaces, "" for our own, in which a configuration wants something of the kernel."""
    services = assembly.services.values()
    forwarding = {each.listener.netns for each in services if getattr(each.handler, "engine", "user") == "kernel"}
    return {*_wanted(assembly), *forwarding}


def with_hint(exc: GostnetError) -> str:
    """Return what is wrong, and what helps."""
    return f"{exc} ({exc.hint})" if exc.hint else str(exc)


def print_error(exc: GostnetError, loaded: Loaded) -> None:
    """Print an error that came up while objects were built, with its place where its path is known."""
    print(at_its_place(exc, loaded.config), file=sys.stderr)
