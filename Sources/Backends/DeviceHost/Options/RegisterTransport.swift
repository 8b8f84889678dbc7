/// How the registers of a device are found by its guest, where the guest's kind leaves a choice.
package enum RegisterTransport: String, CaseIterable, Sendable {
  case mmio
  case pci
}
