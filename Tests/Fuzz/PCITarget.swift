import TestSupport
import Transport

/// A virtio function under any sequence of accesses to its configuration space and its BAR, with interrupts and
/// other backends between them.
enum PCITarget {
  private final class Sender: MessageSender {
    func send(_ message: MSIMessage) {}
  }

  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let line = RecordingLine()
    let transport = PCITransport(device: RecordingDevice(), line: line, sender: Sender(), onStatus: { _ in })
    var isPlugged = true
    while !input.isEmpty {
      let action = input.byte()
      let width = [1, 2, 4, 8][Int(action >> 3 & 3)]
      switch action & 7 {
      case 0: consume(transport.readConfiguration(offset: Int(input.number(bytes: 2)), width: width))
      case 1: transport.writeConfiguration(offset: Int(input.byte()), width: width, value: input.number(bytes: 4))
      // The common structure by its fields; anything else by any offset.
      case 2: consume(transport.read(offset: UInt64(input.byte() & 0x3f), width: width))
      case 3, 4: transport.write(offset: UInt64(input.byte() & 0x3f), width: width, value: input.number(bytes: 4))
      case 5: consume(transport.read(offset: input.number(bytes: 2), width: width))
      case 6: transport.write(offset: input.number(bytes: 2), width: width, value: input.number(bytes: 4))
      default:
        switch action >> 5 & 3 {
        case 0: transport.signals(of: Int(action >> 7)).interruptForUsedBuffers()
        case 1: transport.signals(of: Int(action >> 7)).interruptForConfiguration()
        case 2:
          isPlugged ? transport.unplug() : consume(transport.plug(RecordingDevice()))
          isPlugged.toggle()
        default: transport.signals(of: 0).needReset()
        }
      }
    }
    transport.remove()
    precondition(line.levels.last ?? false == false, "the line stays up behind a removed device")
  }
}
