import TestSupport
import Transport

/// A virtio-mmio window under any sequence of accesses, with backends that come and go between them.
enum RegisterTarget {
  static let run: @Sendable (UnsafeBufferPointer<UInt8>) -> Void = { bytes in
    var input = Input(bytes)
    let line = RecordingLine()
    let transport = MMIOTransport(device: RecordingDevice(), line: line, onStatus: { _ in })
    var isPlugged = true
    while !input.isEmpty {
      let action = input.byte()
      // Registers by their number, so that most accesses hit one; any offset where the top bit is set.
      let offset = action & 0x80 != 0 ? input.number(bytes: 2) : UInt64(action & 0x3f) * 4
      let choice = input.byte()
      let width = [1, 2, 4, 8][Int(choice & 3)]
      // Where no register is: what the device's side does meanwhile.
      if action & 0xbf == 0x3f {
        switch choice & 3 {
        case 0: isPlugged ? transport.unplug() : consume(transport.plug(RecordingDevice()))
        case 1: transport.interruptForUsedBuffers()
        case 2: transport.interruptForConfiguration()
        default: transport.needReset()
        }
        if choice & 3 == 0 { isPlugged.toggle() }
        continue
      }
      if action & 0x40 != 0 {
        transport.write(offset: offset, width: width == 1 ? 4 : width, value: input.number(bytes: 4))
      } else {
        consume(transport.read(offset: offset, width: width))
      }
    }
    transport.remove()
    precondition(line.levels.last ?? false == false, "the line stays up behind a removed device")
  }
}
