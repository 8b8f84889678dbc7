/// XenbusState (xen: public/io/xenbus.h), as the `state` nodes hold it.
package enum XenbusState: String, CaseIterable, Sendable {
  case initialising = "1"
  case initWait = "2"
  case initialised = "3"
  case connected = "4"
  case closing = "5"
  case closed = "6"

  /// Whether a frontend in this state has set the device up, or is about to say with what.
  package var isSetUp: Bool { self == .initialised || self == .connected }
}
