import Lifecycle
import Supervisor
import Transport
import Virtqueue

/// Setup pages of Xenbus devices, made of a right one by changes of the input's; and the texts of a frontend's nodes.
enum SetupTarget {
  private static let offer = XenbusOffer(
    identity: DeviceIdentity(
      deviceID: 2, offeredFeatures: [.version1, .eventIndex, .indirectDescriptors], queueSizes: [256, 1, 32768]),
    maximumPages: 32768, configurationBytes: 60, epoch: 77)

  private static let correct: [UInt8] = {
    var page = [UInt8](repeating: 0, count: XenbusSetup.bytes)
    put(0x3153_5856, &page, 0, 4)
    put(1, &page, 4, 2)
    put(1, &page, 6, 2)
    put(0x3_3000_0000, &page, 8, 8)
    put(77, &page, 0x10, 4)
    put(2048, &page, 0x18, 4)
    put(2, &page, 0x1c, 4)
    put(64, &page, 0x102, 2)
    put(5, &page, 0x104, 4)
    for area in 0..<3 { put(UInt64(0x10000 * (1 + area)), &page, 0x110 + 8 * area, 8) }
    return page
  }()

  private static func put(_ value: UInt64, _ page: inout [UInt8], _ offset: Int, _ width: Int) {
    for index in 0..<width where offset + index < page.count {
      page[offset + index] = UInt8(truncatingIfNeeded: value >> UInt64(8 * index))
    }
  }

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    var page = correct
    while !input.isEmpty {
      let offset = Int(input.byte()) | Int(input.byte() & 15) << 8
      let width = 1 << Int(input.byte() & 3)
      for index in 0..<width where offset + index < page.count { page[offset + index] = input.byte() }
    }
    let setup = page.withUnsafeBytes { page -> XenbusSetup? in try? XenbusSetup(page, offer) }
    if let setup {
      let end = UInt64(setup.pages) << 12
      for queue in setup.queues {
        guard let layout = queue?.layout else { continue }
        precondition(layout.descriptorArea >= 4096 && layout.descriptorArea + UInt64(layout.descriptorBytes) <= end)
        precondition(layout.driverArea + UInt64(layout.driverBytes(packed: false)) <= end)
        precondition(layout.deviceArea + UInt64(layout.deviceBytes(packed: false)) <= end)
        guard setup.readOnlyPages > 0 else { continue }
        let writable = (UInt64(setup.readOnlyPages) + 1) << 12
        precondition(writable < end && layout.deviceArea >= writable)
        precondition(layout.driverArea + UInt64(layout.driverBytes(packed: false)) <= writable)
      }
    }
    let text = String(decoding: bytes, as: UTF8.self)
    consume(FrontendText.bytes(Substring(text)))
    consume(FrontendView.Setup(text))
    consume(FrontendView.ConfigurationWrite(text))
    consume(FrontendText.epoch(offer: text))
  }
}
