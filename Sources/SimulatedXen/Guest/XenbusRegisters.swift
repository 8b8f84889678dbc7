import Transport
import Virtqueue
package import Xen

/// Registers of a device that the guest reaches over Xenbus: what a driver writes is turned into nodes, grants and events, as the Linux
/// module in deploy/guest-module does. The arena is the guest's whole memory, so addresses are what they are elsewhere.
///
/// One thread. A test that wants a wrong frontend changes `alter`, or writes nodes itself.
package final class XenbusRegisters: RegisterAccess {
  private struct Queue {
    var size: UInt32 = 0
    var descriptors: UInt64 = 0
    var driver: UInt64 = 0
    var device: UInt64 = 0
    var isReady = false
    var port: UInt32 = 0
    var inFlight: UInt64 = 0
  }

  package let xenstore: XenStore
  package let frontend: String
  package let backend: String
  private let domain: SimulatedDomain
  private var offer: [String: String] = [:]
  private var select: UInt32 = 0
  private var driverSelect: UInt32 = 0
  private var features: UInt64 = 0
  private var status: UInt32 = 0
  private var queues: [Queue] = []
  private var selected = 0
  package private(set) var sequence = UInt32.random(in: 0..<1 << 24)
  private var configurationWrites = 0
  /// Grants of the arena's pages, then of the directories and the setup page.
  package private(set) var references: [UInt32] = []
  package private(set) var setupReference: UInt32 = 0
  private var directoryReferences: [UInt32] = []
  /// Changes the setup page before the backend may look at it.
  package var alter: (UnsafeMutableRawPointer) -> Void = { _ in }
  /// Pages 1 to this one are granted read-only; the rings must lie accordingly.
  package var readOnlyPages = 0
  /// Seconds to wait for the backend.
  package var patience = 30
  /// Frames at the end of the guest's memory: in-flight areas (64 of them, one page each), directories, setup page.
  private var reserved: Int { domain.memory.pageCount - 64 - 32 - 1 }

  package init(server: XenstoreServer, domain: SimulatedDomain, disk: String) throws(XenError) {
    xenstore = try XenStore(socketPath: server.path)
    self.domain = domain
    frontend = "/local/domain/\(domain.identifier)/device/virtio_disk/\(SimulatedToolstack.deviceNumber(disk))"
    backend = SimulatedToolstack.backendPath(domain.identifier, disk)
  }

  /// A generic device, of any type (`SimulatedToolstack.attachGeneric`).
  package init(server: XenstoreServer, domain: SimulatedDomain, generic device: Int) throws(XenError) {
    xenstore = try XenStore(socketPath: server.path)
    self.domain = domain
    frontend = "/local/domain/\(domain.identifier)/device/virtio/\(device)"
    backend = "/local/domain/0/backend/virtio/\(domain.identifier)/\(device)"
  }

  /// Waits for a value of a node of the backend's; false when the time is over.
  @discardableResult
  package func wait(for value: String, of node: String = "state") -> Bool {
    wait { xenstore.read("\(backend)/\(node)") == value }
  }

  /// Waits until a condition on the backend's nodes holds, woken by their changes.
  private func wait(until condition: () -> Bool) -> Bool {
    xenstore.wait(on: [backend], seconds: patience, until: condition)
  }

  private func readOffer() {
    wait(for: "2")
    offer = offerWords
    queues = Array(repeating: Queue(), count: Int(offer["queues"] ?? "") ?? 0)
  }

  /// The offer as it is now, by key.
  private var offerWords: [String: String] {
    let pairs = (xenstore.read("\(backend)/vx-offer") ?? "").split(separator: " ").map {
      $0.split(separator: "=", maxSplits: 1)
    }
    return pairs.reduce(into: [:]) { if $1.count == 2 { $0[String($1[0])] = String($1[1]) } }
  }

  private var sizes: [UInt32] { (offer["sizes"] ?? "").split(separator: ",").compactMap { UInt32($0) } }
  private var offered: UInt64 { UInt64((offer["features"] ?? "").dropFirst(2), radix: 16) ?? 0 }

  package var configuration: [UInt8] {
    let words = (xenstore.read("\(backend)/vx-config") ?? "").split(separator: " ", omittingEmptySubsequences: false)
    guard words.count == 3 else { return [] }
    let digits = Array(words[2].utf8)
    return stride(from: 0, to: digits.count - 1, by: 2).compactMap {
      UInt8(String(decoding: digits[$0...$0 + 1], as: UTF8.self), radix: 16)
    }
  }

  /// The status in `vx-config`: of it DEVICE_NEEDS_RESET is the backend's word.
  package var backendStatus: UInt32 {
    let words = (xenstore.read("\(backend)/vx-config") ?? "").split(separator: " ")
    return words.count > 1 ? UInt32(words[1], radix: 16) ?? 0 : 0
  }

  package func read(_ offset: UInt64, width: Int) -> UInt64 {
    let queue = queues.indices.contains(selected) ? queues[selected] : Queue()
    switch offset {
    case 0x000: return 0x7472_6976
    case 0x004: return 2
    case 0x008:
      if offer.isEmpty { readOffer() }
      return UInt64(offer["device"] ?? "") ?? 0
    case 0x010: return select == 1 ? offered >> 32 : offered & 0xffff_ffff
    case 0x034: return sizes.indices.contains(selected) ? UInt64(sizes[selected]) : 0
    case 0x044: return queue.isReady ? 1 : 0
    case 0x060: return 1
    case 0x070: return UInt64(status | backendStatus & 0x40)
    case 0x100...:
      let bytes = configuration
      return (0..<width).reduce(0) { value, index in
        let at = Int(offset - 0x100) + index
        return value | (at < bytes.count ? UInt64(bytes[at]) << UInt64(8 * index) : 0)
      }
    default: return 0
    }
  }

  package func write(_ offset: UInt64, width: Int, _ value: UInt64) {
    let word = UInt32(truncatingIfNeeded: value)
    func change(_ body: (inout Queue) -> Void) { if queues.indices.contains(selected) { body(&queues[selected]) } }
    switch offset {
    case 0x014: select = word
    case 0x024: driverSelect = word
    case 0x020:
      features = driverSelect == 1 ? features & 0xffff_ffff | value << 32 : features & ~0xffff_ffff | value
    case 0x030: selected = Int(word)
    case 0x038: change { $0.size = word }
    case 0x044: change { $0.isReady = word & 1 == 1 }
    case 0x080: change { $0.descriptors = value & 0xffff_ffff }
    case 0x090: change { $0.driver = value & 0xffff_ffff }
    case 0x0a0: change { $0.device = value & 0xffff_ffff }
    case 0x050: if queues.indices.contains(Int(word)) { domain.grants.send(queues[Int(word)].port) }
    case 0x070: writeStatus(word)
    case 0x100...: writeConfiguration(Int(offset - 0x100), width, value)
    default: break
    }
  }

  private func writeConfiguration(_ offset: Int, _ width: Int, _ value: UInt64) {
    configurationWrites += 1
    let hex = (0..<width).map { index in
      let byte = UInt8(truncatingIfNeeded: value >> UInt64(8 * index))
      return (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }
    try? xenstore.write("\(frontend)/vx-cfgw", "\(configurationWrites) \(offset) \(hex.joined())")
  }

  private func writeStatus(_ word: UInt32) {
    guard word != 0 else { return reset() }
    let starts = word & 4 != 0 && status & 4 == 0
    status = word
    if starts { connect() }
  }

  // MARK: The handshake

  private func page(_ frame: Int) -> UnsafeMutableRawPointer { domain.memory.pointer(UInt64(frame) << 12) }

  private func grantAll() {
    guard references.isEmpty else { return }
    references = (0..<reserved + 64).map {
      domain.grants.grant(frame: UInt64($0), writable: $0 == 0 || $0 > readOnlyPages)
    }
    let directories = (references.count + 1023) / 1024
    for directory in 0..<directories {
      let frame = reserved + 64 + directory
      for entry in 0..<min(1024, references.count - directory * 1024) {
        page(frame).storeBytes(of: references[directory * 1024 + entry], toByteOffset: 4 * entry, as: UInt32.self)
      }
      directoryReferences.append(domain.grants.grant(frame: UInt64(frame), writable: false))
    }
    setupReference = domain.grants.grant(frame: UInt64(reserved + 96), writable: false)
  }

  /// Fills the setup page and shows it. `connected` tells whether the backend came.
  package private(set) var isConnected = false

  package func connect() {
    grantAll()
    // It may have been offered anew since the driver looked.
    if let epoch = offerWords["epoch"] { offer["epoch"] = epoch }
    let setup = page(reserved + 96)
    setup.initializeMemory(as: UInt8.self, repeating: 0, count: 4096)
    setup.storeBytes(of: 0x3153_5856, as: UInt32.self)
    setup.storeBytes(of: 1, toByteOffset: 4, as: UInt16.self)
    setup.storeBytes(of: features | 3 << 32, toByteOffset: 8, as: UInt64.self)
    setup.storeBytes(of: UInt32(offer["epoch"] ?? "") ?? 0, toByteOffset: 0x10, as: UInt32.self)
    setup.storeBytes(of: UInt32(readOnlyPages), toByteOffset: 0x14, as: UInt32.self)
    setup.storeBytes(of: UInt32(references.count), toByteOffset: 0x18, as: UInt32.self)
    setup.storeBytes(of: UInt32(directoryReferences.count), toByteOffset: 0x1c, as: UInt32.self)
    for (index, reference) in directoryReferences.enumerated() {
      setup.storeBytes(of: reference, toByteOffset: 0x20 + 4 * index, as: UInt32.self)
    }
    var count: UInt16 = 0
    for index in queues.indices where queues[index].isReady {
      if queues[index].port == 0 { queues[index].port = domain.grants.allocatePort() }
      queues[index].inFlight = UInt64(reserved + index) << 12
      let queue = queues[index]
      let entry = setup + 0x100 + 48 * Int(count)
      entry.storeBytes(of: UInt16(index), as: UInt16.self)
      entry.storeBytes(of: UInt16(queue.size), toByteOffset: 2, as: UInt16.self)
      entry.storeBytes(of: queue.port, toByteOffset: 4, as: UInt32.self)
      entry.storeBytes(of: queue.descriptors, toByteOffset: 16, as: UInt64.self)
      entry.storeBytes(of: queue.driver, toByteOffset: 24, as: UInt64.self)
      entry.storeBytes(of: queue.device, toByteOffset: 32, as: UInt64.self)
      if queue.size <= 1024 {
        page(reserved + index).initializeMemory(as: UInt8.self, repeating: 0, count: 4096)
        entry.storeBytes(of: UInt32(queue.inFlight), toByteOffset: 40, as: UInt32.self)
        entry.storeBytes(of: 4 * queue.size, toByteOffset: 44, as: UInt32.self)
      }
      count += 1
    }
    setup.storeBytes(of: count, toByteOffset: 6, as: UInt16.self)
    alter(setup)
    sequence += 1
    try? xenstore.write("\(frontend)/vx-setup", "\(sequence) \(setupReference)")
    try? xenstore.write("\(frontend)/state", "3")
    var isRefused = false
    let answered = wait {
      isRefused = acknowledgement.hasPrefix("\(sequence) error")
      return isRefused || xenstore.read("\(backend)/state") == "4"
    }
    guard answered, !isRefused else { return }
    try? xenstore.write("\(frontend)/state", "4")
    isConnected = true
  }

  /// The backend's word on the last setup.
  package var acknowledgement: String { xenstore.read("\(backend)/vx-ack") ?? "" }

  /// The heads that the backend says it has in a queue.
  package func inFlight(_ queue: Int) -> [Int] {
    let words = domain.memory.pointer(queues[queue].inFlight)
    return (0..<Int(queues[queue].size)).filter { words.load(fromByteOffset: 4 * $0, as: UInt32.self) != 0 }
  }

  private func reset() {
    status = 0
    if isConnected || xenstore.read("\(frontend)/state") == "3" {
      try? xenstore.write("\(frontend)/state", "5")
      if isConnected { wait(for: "6") }
      try? xenstore.write("\(frontend)/state", "6")
      try? xenstore.write("\(frontend)/state", "1")
    }
    isConnected = false
    features = 0
    // A device that is on its way out is not offered again.
    if xenstore.read("\(backend)/online") == "1" { readOffer() } else { offer = [:] }
  }

  /// Ends every grant.
  ///
  /// - Returns: how many the backend still has mapped.
  package func revokeAll() -> Int {
    (references + directoryReferences + [setupReference]).reduce(0) { $0 + (domain.grants.revoke($1) ? 0 : 1) }
  }
}
