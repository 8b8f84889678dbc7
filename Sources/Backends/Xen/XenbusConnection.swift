import EventLoop
package import Transport
import Virtqueue

/// Why a driver is not connected.
package enum ConnectFault: Error, Equatable {
  /// What the guest says cannot be used; it must set the device up again.
  case setup(String)
  /// The host has no room now; to be tried again.
  case noRoom(String)

  package var message: String {
    switch self {
    case .setup(let words), .noRoom(let words): words
    }
  }
}

/// From a setup page to an arena that is mapped and channels that are bound. On the guest's thread.
package enum XenbusConnection {
  /// - Parameters:
  ///   - reference: grant of the setup page.
  ///   - pool: reaches the arena when this returns; the caller detaches it.
  package static func open(
    _ handle: any GrantHandle, setup reference: UInt32, offer: XenbusOffer, pool: GrantPool
  ) throws(ConnectFault) -> (setup: XenbusSetup, doorbells: [(any QueueDoorbell)?]) {
    let setup: XenbusSetup
    let copy = try read(handle, reference, "the setup page")
    let parsed: Result<XenbusSetup, SetupFault> = copy.withUnsafeBytes { bytes in
      do throws(SetupFault) { return .success(try XenbusSetup(bytes, offer)) } catch { return .failure(error) }
    }
    switch parsed {
    case .success(let good): setup = good
    case .failure(let fault): throw .setup(fault.message)
    }
    var references: [UInt32] = []
    references.reserveCapacity(Int(setup.pages))
    for (index, directory) in setup.directories.enumerated() {
      let page = try read(handle, directory, "directory \(index)")
      for entry in 0..<min(1024, Int(setup.pages) - references.count) {
        references.append(
          page.withUnsafeBytes { UInt32(littleEndian: $0.loadUnaligned(fromByteOffset: 4 * entry, as: UInt32.self)) })
      }
    }
    // The same page twice would make a driver's rings overlap in ways that `XenbusSetup` has excluded; harmless to us, so allowed.
    var rings: [(address: UInt64, length: Int)] = []
    for queue in setup.queues {
      guard let layout = queue?.layout else { continue }
      rings.append((layout.descriptorArea, layout.descriptorBytes))
      rings.append((layout.driverArea, layout.driverBytes(packed: false)))
      rings.append((layout.deviceArea, layout.deviceBytes(packed: false)))
      if let area = layout.inFlightArea { rings.append((area, layout.inFlightBytes)) }
    }
    do throws(GrantPool.AttachFault) {
      try pool.attach(handle, references, readOnly: Int(setup.readOnlyPages), rings: rings)
    } catch {
      switch error {
      case .badGrants: throw .setup("the arena's grants cannot be used")
      case .noRoom: throw .noRoom("there is no room for more granted pages (max_maptrack_frames of this domain)")
      }
    }
    var doorbells: [(any QueueDoorbell)?] = []
    for queue in setup.queues {
      do throws(XenError) {
        doorbells.append(try queue.map { entry throws(XenError) in try handle.doorbell(remotePort: entry.port) })
      } catch {
        pool.detach()
        throw .setup("\(error)")
      }
    }
    return (setup, doorbells)
  }

  /// A granted page's bytes, copied by Xen: nothing is mapped that the guest could change between two looks.
  private static func read(_ handle: any GrantHandle, _ reference: UInt32, _ what: String) throws(ConnectFault)
    -> [UInt8]
  {
    var page = [UInt8](repeating: 0, count: XenbusSetup.bytes)
    let result: Result<Bool, XenError> = page.withUnsafeMutableBytes { bytes in
      guard let start = bytes.baseAddress else { return .success(false) }
      do throws(XenError) {
        return .success(try handle.copy(reference, offset: 0, count: bytes.count, local: start, toGuest: false))
      } catch {
        return .failure(error)
      }
    }
    switch result {
    case .success(true): return page
    case .success(false): throw .setup("grant \(reference) of \(what) cannot be read")
    case .failure(let error): throw .noRoom("\(what): \(error)")
    }
  }
}
