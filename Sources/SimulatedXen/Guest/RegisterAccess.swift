package import Transport

/// How a simulated driver reaches a device's registers.
package protocol RegisterAccess: AnyObject {
  func read(_ offset: UInt64, width: Int) -> UInt64
  func write(_ offset: UInt64, width: Int, _ value: UInt64)
}

extension RegisterAccess {
  package func read(_ offset: UInt64) -> UInt32 { UInt32(truncatingIfNeeded: read(offset, width: 4)) }
  package func write(_ offset: UInt64, _ value: UInt32) { write(offset, width: 4, UInt64(value)) }
}

/// Registers by trapped accesses of one vCPU, through the ioreq server: as a real guest.
package final class TrappedRegisters: RegisterAccess {
  private let domain: SimulatedDomain
  private let base: UInt64
  private let vcpu: Int

  package init(domain: SimulatedDomain, base: UInt64, vcpu: Int = 0) {
    self.domain = domain
    self.base = base
    self.vcpu = vcpu
  }

  package func read(_ offset: UInt64, width: Int) -> UInt64 {
    let value = domain.access(vcpu: vcpu, address: base + offset, size: width)
    return width == 8 ? value : value & ((1 << (8 * UInt64(width))) - 1)
  }

  package func write(_ offset: UInt64, width: Int, _ value: UInt64) {
    _ = domain.access(vcpu: vcpu, address: base + offset, size: width, write: value)
  }
}

/// Registers by calls on the transport: for tests of what lies behind it.
package final class DirectRegisters: RegisterAccess {
  private let transport: MMIOTransport

  package init(_ transport: MMIOTransport) { self.transport = transport }

  package func read(_ offset: UInt64, width: Int) -> UInt64 { transport.read(offset: offset, width: width) }

  package func write(_ offset: UInt64, width: Int, _ value: UInt64) {
    transport.write(offset: offset, width: width, value: value)
  }
}
