package import Synchronization
package import Transport

/// The interrupt line of an x86 slot: level-triggered, so it follows InterruptStatus.
package final class IntxLine: InterruptLine {
  private let guest: any GuestHandle
  private let device: UInt8
  private let pin: UInt8

  package init(guest: any GuestHandle, device: UInt8, pin: UInt8) {
    self.guest = guest
    self.device = device
    self.pin = pin
  }

  package var isLevel: Bool { true }

  package func set(_ high: Bool) { guest.setPCIIntx(device: device, pin: pin, high: high) }
}

/// The interrupt line of an Arm device: libxl declares it edge-triggered, and Xen's vGIC takes each level 1 as an edge.
package final class SPILine: InterruptLine {
  private let guest: any GuestHandle
  private let irq: UInt32

  package init(guest: any GuestHandle, irq: UInt32) {
    self.guest = guest
    self.irq = irq
  }

  package var isLevel: Bool { false }

  package func set(_ high: Bool) { guest.setIRQ(irq, high: high) }
}

/// Message-signalled interrupts of an x86 guest.
package final class GuestMessages: MessageSender {
  private let guest: any GuestHandle
  /// Messages that Xen did not accept: a delivery mode or a processor that does not exist. The driver's mistake, and its loss.
  package let refused = Atomic<UInt64>(0)

  package init(guest: any GuestHandle) { self.guest = guest }

  package func send(_ message: MSIMessage) {
    if !guest.injectMSI(address: message.address, data: message.data) { refused.wrappingAdd(1, ordering: .relaxed) }
  }
}

extension DeviceSlot {
  /// The line that this slot's interrupt is driven by.
  package func line(of guest: any GuestHandle) -> any InterruptLine {
    switch interrupt {
    case .pciIntx(let device, let pin): IntxLine(guest: guest, device: device, pin: pin)
    case .spi(let irq): SPILine(guest: guest, irq: irq)
    }
  }
}
