import Backends
import Devices
import EventLoop
import Glibc
import Transport
import Virtqueue
import Xen

/// What survives the daemon: found at its start, left at its end.
extension Supervisor {
  // MARK: Found

  /// Puts the devices that an earlier daemon served back into the guest's slots, without backends: registers are answered at once, so no
  /// vCPU waits for an image to be opened.
  ///
  /// - Returns: the ioreq server that is ours.
  func restore(_ session: GuestSession, _ mmio: GuestSession.MMIOSide) -> UInt16? {
    guard let folder = settings.stateFolder, let saved = folder.guest(session.domain) else { return nil }
    guard saved.uuid == session.uuid else {
      // Domain numbers come again.
      folder.forgetAll(session.domain)
      return nil
    }
    for key in folder.contents.devices where key.domain == session.domain { restore(key, session, mmio, folder) }
    log.notice(
      "guest \(session.name): going on where an earlier vxd was stopped, with \(session.restored.count) devices",
      metadata: ["GUEST": "\(session.name)"])
    return saved.server
  }

  private func restore(
    _ key: DeviceKey, _ session: GuestSession, _ mmio: GuestSession.MMIOSide, _ folder: StateFolder
  ) {
    let state: DeviceState
    do throws(StateFault) {
      state = try DeviceState(path: folder.devicePath(key))
    } catch {
      log.error(
        "guest \(session.name), device \(key.device): \(error.message)", metadata: ["GUEST": "\(session.name)"])
      folder.forget(key)
      session.lost[key] = error.message
      return
    }
    let place = state.place
    guard !place.isXenbus else { return folder.forget(key) }
    let slot =
      place.sharedInterrupt == 0
      ? SlotTable.slot(min(max(place.index, 0), SlotTable.maximumCount - 1))
      : DeviceSlot(index: 0, base: place.base, interrupt: .spi(place.sharedInterrupt))
    let saved = state.saved
    let relay = StatusRelay()
    let transport = MMIOTransport(
      restoring: state.shape.profile, saved.registers, saved.status, configuration: saved.configuration,
      line: slot.line(of: mmio.handle), state: state, onStatus: statusReporter(key, relay))
    session.restored[key] = RestoredDevice(state: state, transport: transport, slot: slot, relay: relay)
  }

  /// What a device's transport calls at each change of its status.
  func statusReporter(_ key: DeviceKey, _ relay: StatusRelay) -> @Sendable (DeviceStatus) -> Void {
    { [self] status in
      if relay.put(status) { onLoop { $0.statusChanged(key, relay.take()) } }
    }
  }

  /// Ends what an earlier daemon left and no entry in Xenstore speaks of any more.
  func sweepSavedState() {
    guard let folder = settings.stateFolder else { return }
    let contents = folder.contents
    for domain in contents.guests where sessions[domain] == nil {
      do throws(XenError) {
        guard let session = try session(for: domain) else { continue }
        log.notice("domain \(domain): an earlier vxd left an ioreq server that nothing needs any more")
        closeIfUnused(session)
      } catch {
        folder.forgetAll(domain)
      }
    }
    for session in sessions.values {
      let cell = session.cell
      for (key, device) in session.restored {
        folder.forget(key)
        session.thread.loop.enqueue { cell.server?.detach(device.slot) }
      }
      session.restored = [:]
    }
    for key in folder.contents.devices where sessions[key.domain]?.devices[key] == nil { folder.forget(key) }
  }

  // MARK: Made

  /// Gives a device its saved state with its first backend, on the data thread: that of the earlier daemon, or a new one.
  func stateMaker(
    _ record: DeviceRecord
  ) -> @Sendable (DeviceState.Shape) throws(StartFault) -> DeviceState {
    let known = record.state
    let log = log
    let path = settings.stateFolder?.devicePath(record.key)
    let place =
      record.slot.map { slot in
        var interrupt: UInt32 = 0
        if case .spi(let number) = slot.interrupt { interrupt = number }
        return DeviceState.Place(base: slot.base, index: slot.index, sharedInterrupt: interrupt)
      } ?? .xenbus
    return { shape throws(StartFault) in
      if let known {
        guard known.shape.slotCount == shape.slotCount, known.shape.chainLimit == shape.chainLimit,
          known.shape.profile.queueSizes == shape.profile.queueSizes
        else {
          throw .state("the store now gives \(shape.profile.queueSizes.count) queues, the guest uses others")
        }
        return known
      }
      if let path {
        do throws(Errno) {
          return try DeviceState(path: path, shape: shape, place: place)
        } catch {
          // A disk that does not survive a restart of vxd is better than none.
          log.error(
            "\(path) cannot be made (\(error)): this device will have to be reset by its guest when vxd is restarted")
        }
      }
      do throws(Errno) {
        return try DeviceState(shape: shape, place: place)
      } catch {
        throw .host(error)
      }
    }
  }

  // MARK: Left

  /// Lets go of a guest: data threads end, the ioreq server stays in Xen, and whatever the guest asks for waits for the next daemon.
  func handOver(_ session: GuestSession) {
    session.phase = .closing
    let domain = session.domain
    let cell = session.cell
    let transports: [any DeviceTransport] =
      session.devices.values.compactMap(\.transport) + session.restored.values.map(\.transport)
    session.thread.loop.enqueue { [self] in
      // No vCPU is answered from here on: what a device does last is in its journals.
      cell.server?.leave()
      cell.server = nil
      for transport in transports { transport.unplug() }
      onLoop { $0.leftServer(domain) }
    }
  }

  private func leftServer(_ domain: DomainID) {
    guard let session = sessions[domain] else { return }
    let backends = session.devices.values.compactMap(\.backend)
    for record in session.devices.values { record.backend = nil }
    let finish: @Sendable () -> Void = { [self] in onLoop { $0.leftDevices(domain) } }
    let last = Countdown(left: backends.count + 1, finish)
    for backend in backends { backend.stop { last.step() } }
    last.step()
  }

  private func leftDevices(_ domain: DomainID) {
    guard let session = sessions[domain] else { return }
    for record in session.devices.values {
      record.joinThreads()
      guard let link = record.link else { continue }
      let transport = link.transport
      session.thread.perform { transport?.leave() }
      link.pool.detach()
    }
    session.mmio?.pool.close()
    session.thread.stopAndJoin()
    sessions[domain] = nil
    forget(session)
    stopIfEmpty()
  }
}
